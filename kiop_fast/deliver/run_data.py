"""What a run folder holds, read for evaluation and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiop_fast.config_io import load_toml
from kiop_fast.errors import RunError
from kiop_fast.prompt.artefact import Artefact, load_prompt
from kiop_fast.runtime.files import read_lines


@dataclass(frozen=True)
class BankImages:
    """Synthetic images of a task, in the order they were made.

    Attributes:
        images: (M, C, s, s) uint8.
        targets: (M,) int64, the class each was made for.
    """

    images: Tensor
    targets: Tensor

    def examples(self, label: int, count: int) -> Tensor:
        """The newest ``count`` (or fewer) images made for a class."""
        rows = (self.targets == label).nonzero().view(-1)
        return self.images[rows[-count:].flip(0)]

    def spread(self, count: int, classes: int) -> Tensor:
        """Up to ``count`` images, the newest of every class, then the second newest, …"""
        each = [self.examples(label, -(-count // classes)) for label in range(classes)]
        rounds = range(max(len(images) for images in each))
        turns = [images[i] for i in rounds for images in each if i < len(images)]
        return torch.stack(turns[:count])


@dataclass(frozen=True)
class RunData:
    """A run folder; what is not there is empty or None.

    Attributes:
        path: the folder.
        config: settings, nested.
        metrics, timings: one record an epoch.
        artefact: the prompt; None while unfinished and in mode ``vanilla``.
        banks: synthetic images by task.
        evaluation: what :func:`kiop_fast.deliver.evaluate.evaluate` found, if it was kept.
    """

    path: Path
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    artefact: Artefact | None
    banks: Mapping[str, BankImages]
    evaluation: Mapping[str, Any] | None


def read_run(path: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        RunError: it is no run folder, or a file in it is damaged.
        ArtefactError: its prompt is damaged.
    """
    path = Path(path)
    if not (path / "config.toml").is_file():
        raise RunError("this is no run folder", got=path, expected="a folder with a config.toml",
                       fix="give the --out of a kiop-fast train")  # fmt: skip
    prompt, kept = path / "prompt.safetensors", path / "evaluation.json"
    try:
        metrics, timings = (read_lines(path / f"{n}.jsonl") for n in ("metrics", "timings"))
        evaluation = json.loads(kept.read_text()) if kept.exists() else None
    except ValueError as error:
        raise RunError("a file of the run is damaged", got=f"{path}: {error}",
                       expected="JSON as kiop_fast wrote it",
                       fix="train again") from None  # fmt: skip
    return RunData(
        path, load_toml(path / "config.toml"), metrics, timings,
        load_prompt(prompt) if prompt.exists() else None, read_banks(path), evaluation,
    )  # fmt: skip


def read_banks(path: str | Path) -> dict[str, BankImages]:
    """Images and targets of every task's bank (features stay on disk); {} if there are none."""
    banks = {}
    for folder in sorted(p for p in (Path(path) / "banks").glob("*") if p.is_dir()):
        parts = [_images(file) for file in sorted(folder.glob("[0-9]*.safetensors"))]
        if parts:
            images, targets = zip(*parts, strict=True)
            banks[folder.name] = BankImages(torch.cat(images), torch.cat(targets))
    return banks


def _images(file: Path) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor("images"), tensors.get_tensor("targets")
    except (OSError, SafetensorError) as error:
        raise RunError("a bank of the run is damaged", got=f"{file}: {error}",
                       expected="a file that kiop_fast wrote",
                       fix="train again") from None  # fmt: skip
