"""Small stand-ins for what the authors' scripts read: datasets and checkpoints in their places."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

SIGNS, DIGITS = 43, 10


def pictures(
    count: int, classes: int, side: int, channels: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(count, side, side[, 3]) uint8 and labels: a wave a class, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    y, x = np.mgrid[:side, :side] / side
    images = np.empty((count, side, side, channels))
    for i, label in enumerate(labels):
        for c in range(channels):
            angle = np.pi * label / classes + c
            wave = np.sin(2 * np.pi * (1 + label % 4) * (x * np.cos(angle) + y * np.sin(angle)))
            images[i, :, :, c] = 127 + 80 * wave + 25 * rng.standard_normal((side, side))
    images = images.clip(0, 255).astype(np.uint8)
    return (images[..., 0] if channels == 1 else images), labels


def _idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.write_bytes(content)
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(content)


def write_mnist(root: Path, train: int, test: int, name: str = "MNIST") -> None:
    """``root/NAME/raw`` as idx files, plain (torchvision) and packed (the scripts' reader)."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = pictures(count, DIGITS, 28, 1, seed)
        _idx(raw / f"{split}-images-idx3-ubyte", images)
        _idx(raw / f"{split}-labels-idx1-ubyte", labels)


def write_gtsrb(root: Path, train: int, test: int) -> None:
    """``root/gtsrb`` as ppm files, with the test set's csv."""
    base = root / "gtsrb"
    images, labels = pictures(train, SIGNS, 36, 3, 2)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:05d}.ppm")
    images, labels = pictures(test, SIGNS, 36, 3, 3)
    folder = base / "GTSRB" / "Final_Test" / "Images"
    folder.mkdir(parents=True)
    with open(base / "GT-final_test.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "ClassId"])
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / f"{i:05d}.ppm")
            rows.writerow([f"{i:05d}.ppm", int(label)])


def write_source(path: Path, backbone: str, classes: int, seed: int) -> nn.Module:
    """A torchvision model with random weights and lived-in BatchNorm, as a torch state dict."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(models, backbone)(weights=None, num_classes=classes)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32) * 2 - 1)
    torch.save(model.state_dict(), path)
    return model


def write_vgg_signs(path: Path, canvas: int, seed: int) -> None:
    """A vgg13_bn with random layers whose last one is a ridge regression of GTSRB's stand-ins.

    So its accuracy is far from chance without a training.  Images are fitted as A sees them
    through a new prompt (32 pixels inside ``canvas``, 0.5 around), with dropout on.
    """
    torch.manual_seed(seed)
    model = models.vgg13_bn(weights=None, num_classes=SIGNS).train()
    pixels, labels = pictures(4 * SIGNS, SIGNS, 36, 3, 4)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    left = (canvas - 32 + 1) // 2
    seen = F.pad(images, (left, canvas - 32 - left, left, canvas - 32 - left), value=0.5)
    with torch.no_grad():
        flat = [model.avgpool(model.features(part)).flatten(1) for part in seen.split(SIGNS)]
        hidden = torch.cat([model.classifier[:6](torch.cat(flat)) for _ in range(4)])
        _fit(model.classifier[6], hidden, torch.from_numpy(labels).repeat(4))
    torch.save(model.state_dict(), path)


def _fit(last: nn.Linear, hidden: Tensor, labels: Tensor, scale: float = 12.0) -> None:
    """Ridge regression (N, in) → ``scale`` at the label, 0 elsewhere, into ``last``."""
    wanted = scale * F.one_hot(labels, last.out_features).float()
    middle = hidden.mean(dim=0)
    centred = hidden - middle
    gram = centred @ centred.T
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
    last.weight.copy_(torch.linalg.solve(gram + ridge, wanted - wanted.mean(dim=0)).T @ centred)
    last.bias.copy_(wanted.mean(dim=0) - last.weight @ middle)


def working_folder(path: Path, train: int = 86, test: int = 86) -> Path:
    """Datasets below ``data/torchdata`` and the two checkpoints of ``KiOP_BF.sh``-like runs."""
    root = path / "data" / "torchdata"
    write_mnist(root, train, test)
    write_gtsrb(root, train, test)
    write_source(path / "ResNet18_32_mnist", "resnet18", DIGITS, 1)
    write_source(path / "ResNet18_gtsrb", "resnet18", SIGNS, 2)
    return path
