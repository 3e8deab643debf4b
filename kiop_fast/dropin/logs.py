"""Log lines, log files and pictures of the form that the scripts write."""

from __future__ import annotations

import logging
import math
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_DATE = "%m/%d %H:%M:%S"


def folder(flags: Namespace) -> Path:
    """``checkpoints/datafree-METHOD`` in the working folder."""
    return Path("checkpoints") / f"datafree-{flags.method}"


def tag(flags: Namespace) -> str:
    """``-TAG``, or nothing."""
    return f"-{flags.log_tag}" if flags.log_tag else ""


def names(flags: Namespace) -> str:
    """``DATASET-TEACHER-STUDENT``: logger and checkpoint are called so."""
    return f"{flags.dataset}-{flags.teacher}-{flags.student}"


def open_log(flags: Namespace) -> logging.Logger:
    """A logger to standard output and to the scripts' log file, appended."""
    path = folder(flags) / f"log-{names(flags)}{tag(flags)}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(names(flags), logging.DEBUG)
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("[%(asctime)s %(name)s]: %(message)s", _DATE))
    file = logging.FileHandler(path)
    line = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    file.setFormatter(logging.Formatter(line, _DATE))
    for handler in (screen, file):
        log.addHandler(handler)
    return log


def close_log(log: logging.Logger) -> None:
    """Flush and close its files."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)


def eval_line(epoch: int, found: Mapping[str, Mapping[str, float]], lr: float) -> str:
    """``[Eval] Epoch=…``, from B's, A's (``_tea``) and a third model's (``_son``) numbers.

    Args:
        epoch: from 0.
        found: by suffix, ``""`` for B: ``top1``, ``top5`` (percent) and ``loss``.
    """
    parts = [
        f"Acc@1{suffix}={one['top1']:.4f} Acc@5{suffix}={one['top5']:.4f} "
        f"Loss{suffix}={one['loss']:.4f}"
        for suffix, one in found.items()
    ]
    return f"[Eval] Epoch={epoch} {' '.join(parts)} Lr={lr:.4f}"


def train_lines(epoch: int, log: Tensor, every: int, lr: float, own: bool) -> list[str]:
    """``[Train] Epoch=… Iter=i/n`` lines of one storing period, means since the line before.

    ``train_Loss`` is the loss that is trained (KL at ``--T``); top-5 agreement is not measured
    while training and reads ``nan``.

    Args:
        log: (steps, 2 · tasks): each task's loss, then its share of agreeing arg-maxima.
        every: ``--print_freq``.
        own: A's own task is the first column (KiOP_BF); B's columns come after it.
    """
    tasks, lines, since = log.shape[1] // 2, [], 0
    columns = [1, 0] if own else [0]
    for i in range(0, len(log), every):
        part = log[since : i + 1].mean(dim=0)
        since = i + 1
        fields = [
            f"train_acc@1{end}={100 * part[tasks + task]:.4f}, train_acc@5{end}=nan, "
            f"train_Loss{end}={part[task]:.4f}"
            for end, task in zip(("", "_1"), columns, strict=False)
        ]
        lines.append(f"[Train] Epoch={epoch} Iter={i}/{len(log)}, {', '.join(fields)}, Lr={lr:.4f}")
    return lines


def write_pngs(images: Tensor, path: Path, first: int, batch: int) -> None:
    """Images (N, C, s, s) uint8 as ``CALL-ROW.png``, numbered as the scripts number theirs."""
    path.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images.cpu(), start=first):
        _picture(image.permute(1, 2, 0).numpy()).save(path / f"{row // batch}-{row % batch}.png")


def write_grid(images: Tensor, path: Path) -> None:
    """All images on one square sheet with a black pixel between them."""
    count, channels, side, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows, step = math.ceil(count / columns), side + 1
    sheet = torch.zeros(channels, rows * step - 1, columns * step - 1, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = i // columns * step, i % columns * step
        sheet[:, top : top + side, left : left + side] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(sheet.permute(1, 2, 0).numpy()).save(path)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
