"""The paper's six datasets, read by torchvision from ``KIOP_FAST_DATA`` (default ``./data``)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kiop_fast.data.files import FileSplit
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
    """Fetch a dataset into the data folder through torchvision, checksums verified; the folder.

    Raises:
        DataError: unknown name, no network, or files that do not arrive whole.
    """
    if name not in INFOS:
        raise unknown_name("torchvision dataset", name, INFOS, DataError)
    folder = data_folder()
    try:
        for split in ("train", "test"):
            _open(name, split, folder, download=True)
    except _UNREADABLE as error:
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"dataset {name!r} cannot be downloaded", got=f"{type(error).__name__}: {lines[-1]}",
            expected="a network, and files with the checksums that torchvision knows",
            fix=f"try again, or copy the files of another machine to {folder.resolve()}",
        ) from None  # fmt: skip
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
    if name in ("mnist", "fmnist") and not download:
        _unpack(datasets.MNIST if name == "mnist" else datasets.FashionMNIST, folder)
    return makers[name](root, download=download)


def _unpack(kind: Any, folder: Path) -> None:
    """Unpack .gz files that lie there without what is in them, after their checksums."""
    from torchvision.datasets.utils import check_md5, extract_archive

    for name, md5 in kind.resources:
        packed = folder / kind.__name__ / "raw" / name
        if not packed.exists() or packed.with_suffix("").exists():
            continue
        if not check_md5(str(packed), md5):
            raise ValueError(f"{packed} has another checksum than {md5}")
        extract_archive(str(packed))


def read(name: str, split: str, side: int) -> Split | FileSplit:
    """A split at ``side``: uint8 tensors, or (gtsrb) files; nothing is downloaded.

    Raises:
        DataError: the files are not there, damaged, or of a wrong checksum.
    """
    folder = data_folder()
    try:
        opened = _open(name, split, folder, download=False)
        if name == "gtsrb":
            return _signs(opened._samples, split, side)
        images, labels = _read_whole(opened)
        _check_labels(labels, len(INFOS[name].classes))
        return Split(resize(images, side), labels)
    except _UNREADABLE as error:
        raise DataError(
            f"dataset {name!r} cannot be read", got=f"{type(error).__name__}: {error}",
            expected=f"its files, whole and as torchvision lays them out, under {folder.resolve()} "
            "(another folder: set KIOP_FAST_DATA)",
            fix="with a network: python -c \"from kiop_fast.data import download; "
            f"download('{name}')\"",
        ) from None  # fmt: skip


# What readers of damaged files raise; KiopErrors are none of these.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, ImportError, AssertionError, TypeError,
               KeyError, IndexError, pickle.UnpicklingError)  # fmt: skip


def _check_labels(labels: Tensor, classes: int) -> None:
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels are not 0 to {classes - 1}")


def _signs(samples: list[tuple[str, int]], split: str, side: int) -> FileSplit:
    """Single files of many sizes; a training file's folder is its class."""
    paths = tuple(Path(path) for path, _ in samples)
    numbers = [int(p.parent.name) for p in paths] if split == "train" else [n for _, n in samples]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} and {len(missing) - 1} more are not there")
    labels = torch.tensor(numbers, dtype=torch.int64)
    _check_labels(labels, len(SIGNS))
    return FileSplit(paths, labels, side, 3)


def _read_whole(opened: Any) -> tuple[Tensor, Tensor]:
    """Images (N, C, s, s) and labels of a torchvision dataset that keeps all in one array."""
    images = torch.as_tensor(opened.data)
    if images.ndim == 3:  # mnist, fmnist: (N, s, s)
        images = images[:, None]
    elif images.shape[-1] == 3:  # cifar: (N, s, s, 3); svhn comes as (N, 3, s, s)
        images = images.permute(0, 3, 1, 2)
    labels = opened.targets if hasattr(opened, "targets") else opened.labels
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return images.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64)


DATASETS = tuple(
    Dataset(info, partial(read, name, "train"), partial(read, name, "test"))
    for name, info in INFOS.items()
)
