"""The paper's six datasets, read by torchvision from ``KIOP_FAST_DATA`` (default ``./data``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kiop_fast.data.names import CIFAR10, CIFAR100, FASHION, SIGNS
from kiop_fast.data.resize import resize
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.errors import DataError, unknown_name

_DIGITS = tuple("0123456789")
_HALF = (0.5, 0.5, 0.5)

# Facts of SPEC section 10; mean and std are those the authors' sources were trained with.
INFOS = {
    info.name: info
    for info in (
        DatasetInfo("mnist", 28, 1, _DIGITS),
        DatasetInfo("fmnist", 28, 1, FASHION),
        DatasetInfo("cifar10", 32, 3, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
                    pad=4, flip=0.5),
        DatasetInfo("cifar100", 32, 3, CIFAR100, (0.5071, 0.4867, 0.4408),
                    (0.2675, 0.2565, 0.2761), pad=4, flip=0.5),
        DatasetInfo("svhn", 32, 3, _DIGITS),
        DatasetInfo("gtsrb", 32, 3, SIGNS, _HALF, _HALF),
    )
}  # fmt: skip


def data_folder() -> Path:
    """Where downloaded datasets lie."""
    return Path(os.environ.get("KIOP_FAST_DATA") or "data")


def download(name: str) -> Path:
    """Fetch a dataset into the data folder through torchvision; the folder."""
    if name not in INFOS:
        raise unknown_name("torchvision dataset", name, INFOS, DataError)
    folder = data_folder()
    for split in ("train", "test"):
        _open(name, split, folder, download=True)
    return folder


def _open(name: str, split: str, folder: Path, *, download: bool) -> Any:
    from torchvision import datasets

    root, train = str(folder), split == "train"
    makers: dict[str, Callable[..., Any]] = {
        "mnist": partial(datasets.MNIST, train=train),
        "fmnist": partial(datasets.FashionMNIST, train=train),
        "cifar10": partial(datasets.CIFAR10, train=train),
        "cifar100": partial(datasets.CIFAR100, train=train),
        "svhn": partial(datasets.SVHN, split=split),
        "gtsrb": partial(datasets.GTSRB, split=split),
    }
    return makers[name](root, download=download)


def read(name: str, split: str, side: int) -> Split:
    """A split as uint8 tensors at ``side``; nothing is downloaded.

    Raises:
        DataError: the files are not there or damaged.
    """
    folder = data_folder()
    try:
        opened = _open(name, split, folder, download=False)
        if name == "gtsrb":
            images, labels = _read_one_by_one(opened, side)
        else:
            images, labels = _read_whole(opened)
    except (OSError, RuntimeError, EOFError, ValueError, ImportError) as error:
        raise DataError(
            f"dataset {name!r} cannot be read", got=f"{type(error).__name__}: {error}",
            expected=f"its files, as torchvision lays them out, under {folder.resolve()} "
            "(another folder: set KIOP_FAST_DATA)",
            fix="with a network: python -c \"from kiop_fast.data import download; "
            f"download('{name}')\"",
        ) from None  # fmt: skip
    return Split(resize(images, side), labels)


def _read_whole(opened: Any) -> tuple[Tensor, Tensor]:
    """Images (N, C, s, s) and labels of a torchvision dataset that keeps all in one array."""
    images = torch.as_tensor(opened.data)
    if images.ndim == 3:  # mnist, fmnist: (N, s, s)
        images = images[:, None]
    elif images.shape[-1] == 3:  # cifar: (N, s, s, 3); svhn comes as (N, 3, s, s)
        images = images.permute(0, 3, 1, 2)
    labels = opened.targets if hasattr(opened, "targets") else opened.labels
    return images.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)


def _read_one_by_one(opened: Any, side: int) -> tuple[Tensor, Tensor]:
    """The same for a dataset of single files of many sizes."""
    images, labels = [], []
    for picture, label in opened:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        images.append(resize(pixels[None], side))
        labels.append(label)
    return torch.cat(images), torch.tensor(labels)


DATASETS = tuple(
    Dataset(info, partial(read, name, "train"), partial(read, name, "test"))
    for name, info in INFOS.items()
)
