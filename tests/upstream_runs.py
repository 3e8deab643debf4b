"""Small runs of the scripts' command lines on a tiny backbone, and where their files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from upstream_files import DIGITS, SIGNS, write_gtsrb, write_mnist, write_source

from kiop_fast.dropin import settings
from kiop_fast.dropin.command import run_upstream
from kiop_fast.source.small_nets import SMALL_NETS

FLAGS = """--method cmi --dataset mnist --real_dataset gtsrb --backbone_t Tiny --backbone_s Tiny
--teacher mnist --student gtsrb --img_size 16 --vp1_size 20 --vp2_size 28 --batch_size 8
--g_steps 2 --kd_steps 3 --ep_steps 3 --epochs 2 --adv 0.5 --bn 1 --oh 1 --T 20 --lr 0.8
--lr_g 0.01 --seed 0 --save_dir run/b --save_dir_1 run/a""".split()  # noqa: SIM905


class Tiny(nn.Module):
    """A network with the parts of torchvision's that the replay touches."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 9, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(9)
        self.fc = nn.Linear(9, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with both datasets and a tiny backbone that torchvision seems to have."""

    def tiny(weights: Any = None, num_classes: int = 1000) -> nn.Module:
        return Tiny(num_classes)

    monkeypatch.setattr(torchvision.models, "tiny", tiny, raising=False)
    monkeypatch.setitem(settings.BACKBONES, "Tiny", "tiny")
    monkeypatch.setitem(SMALL_NETS, "tiny", Tiny)
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data" / "torchdata", 20, 23)
    write_gtsrb(tmp_path / "data" / "torchdata", 43, 43)
    write_source(tmp_path / "Tiny_32_mnist", "tiny", DIGITS, 1)
    write_source(tmp_path / "Tiny_gtsrb", "tiny", SIGNS, 2)
    return tmp_path


def go(*change: str, script: str = "KiOP_BF") -> Any:
    base = FLAGS if script != "KiOP_B" else FLAGS[:-2]
    return run_upstream(script, [*base, *change])


def pth(name: str = "mnist-mnist-gtsrb", method: str = "cmi") -> dict[str, Any]:
    """As the scripts load it: torch's default, which unpickles nothing but plain values."""
    return torch.load(Path("checkpoints") / f"datafree-{method}" / f"{name}.pth")


def lines(name: str = "mnist-mnist-gtsrb", method: str = "cmi") -> list[str]:
    return (Path("checkpoints") / f"datafree-{method}" / f"log-{name}.txt").read_text().splitlines()


def always_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets of random weights may read nothing at all: let every epoch be saved."""
    best = property(lambda job: -1.0, lambda job, value: None)
    monkeypatch.setattr("kiop_fast.dropin.command.Job.best", best, raising=False)
