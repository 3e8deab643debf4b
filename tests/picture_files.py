"""Small files in every on-disk format of a dataset; no test lives here."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def pictures(count: int, *shape: int, pace: float = 0.37) -> Pixels:
    """Smooth waves with a different phase and tilt each, (count, *shape) uint8."""
    height, width = shape[:2]
    y, x = np.mgrid[:height, :width] / max(height, width)
    made = np.empty((count, *shape))
    for i in range(count):
        for c in range(shape[2] if len(shape) > 2 else 1):
            wave = 127 + 120 * np.sin(6 * (x * np.cos(i + c) + y * np.sin(i + 2 * c)) + pace * i)
            made[i, ..., c] = wave if len(shape) > 2 else made[i, ..., c]
            if len(shape) == 2:
                made[i] = wave
    return np.rint(made).astype(np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(path: Path, array: Pixels, *, packed: bool) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)


def write_mnist(
    root: Path, patch: pytest.MonkeyPatch, images: Pixels, labels: list[int], *,
    kind: str = "MNIST", packed: bool = True,
) -> Path:  # fmt: skip
    """idx(.gz) files as downloaded, with torchvision's table of checksums made to fit them."""
    from torchvision import datasets

    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    end = ".gz" if packed else ""
    for start in ("train", "t10k"):
        write_idx(folder / f"{start}-images-idx3-ubyte{end}", images, packed=packed)
        numbers = np.array(labels, np.uint8)
        write_idx(folder / f"{start}-labels-idx1-ubyte{end}", numbers, packed=packed)
    if packed:
        resources = [(p.name, md5(p)) for p in sorted(folder.iterdir())]
        patch.setattr(getattr(datasets, kind), "resources", resources)
    return folder


def write_cifar(
    root: Path, patch: pytest.MonkeyPatch, images: Pixels, labels: list[int], *, fine: bool = False
) -> Path:
    """Pickled batches of CIFAR-10 (or, ``fine``, CIFAR-100), images (n, 32, 32, 3)."""
    from torchvision import datasets

    kind = datasets.CIFAR100 if fine else datasets.CIFAR10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    key = "fine_labels" if fine else "labels"

    def dump(name: str, value: Any) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
        return name, md5(folder / name)

    for split in ("train_list", "test_list"):
        names = [name for name, _ in getattr(kind, split)]
        parts = np.array_split(np.arange(len(images)), len(names))
        listed = [
            dump(name, {"data": flat[part], key: [labels[i] for i in part]})
            for name, part in zip(names, parts, strict=True)
        ]
        patch.setattr(kind, split, listed)
    names = [f"class {i}" for i in range(100 if fine else 10)]
    meta = dump(kind.meta["filename"], {kind.meta["key"]: names})
    patch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    return folder


def write_svhn(
    root: Path, patch: pytest.MonkeyPatch, images: Pixels, labels: list[int]
) -> list[Path]:
    """.mat files; the digit 0 is class 10 there."""
    from scipy.io import savemat
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    table, paths = {}, []
    for split, (url, name, _) in datasets.SVHN.split_list.items():
        numbers = np.array([[label or 10] for label in labels], np.uint8)
        savemat(root / name, {"X": images.transpose(1, 2, 3, 0), "y": numbers})
        table[split] = [url, name, md5(root / name)]
        paths.append(root / name)
    patch.setattr(datasets.SVHN, "split_list", table)
    return paths


def write_gtsrb(root: Path, images: list[Pixels], labels: list[int]) -> Path:
    """ppm files by class folder for training; ppm files and a csv for testing."""
    base = root / "gtsrb"
    test = base / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        train = base / "GTSRB" / "Training" / f"{label:05d}"
        train.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(train / f"{i:05d}_00000.ppm")
        Image.fromarray(pixels).save(test / f"{i:05d}.ppm")
        height, width = pixels.shape[:2]
        rows.append(f"{i:05d}.ppm;{width};{height};5;5;9;9;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return base


def write_folder(root: Path, classes: dict[str, list[tuple[str, Pixels]]]) -> Path:
    """One folder a class; a file's suffix chooses its format."""
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for file, pixels in files:
            Image.fromarray(pixels).save(root / name / file)
    return root
