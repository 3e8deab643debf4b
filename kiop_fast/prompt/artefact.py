"""The artefact: one safetensors file that holds a prompt and all that is needed to serve it.

Tensors: ``ring.{k}`` (C, n_k) fp16, border cells only; ``task.{i}.mapping`` (classes,) int64;
``task.{i}.statistics.{buffer}`` fp32.  Everything else is JSON in the header, under one key, with
a sha256 over the JSON and every tensor, so that a damaged file is never served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kiop_fast.config import BATCHNORM_POLICIES
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import ArtefactError, KiopError, unknown_name
from kiop_fast.prompt.parts import check_parts
from kiop_fast.prompt.rings import Prompt
from kiop_fast.prompt.served import ArtefactTarget, ArtefactTask, ServedPrompt
from kiop_fast.runtime.files import atomic_write
from kiop_fast.source import Source

FORMAT_VERSION = 1
_KEY = "kiop_fast.prompt"


@dataclass(frozen=True, eq=False)
class Artefact:
    """A trained prompt with everything that serving it takes.

    Cells are rounded to fp16 on construction: an artefact in memory equals its file.

    Attributes:
        side: image side, pixels.
        rings: canvas side after each ring, pixels.
        cells: one (channels, n_k) fp16 tensor a ring.
        tasks: in the order of training, A's first where it has one.
        target: model A.
        batchnorm: calibrated | running | batch (SPEC section 7).
        config: the run's settings, nested.
        versions: of the libraries that made it.
        metrics: of the last epoch.
        version: of the file format.
    """

    side: int
    rings: tuple[int, ...]
    cells: Sequence[Tensor]
    tasks: tuple[ArtefactTask, ...]
    target: ArtefactTarget
    batchnorm: str = "calibrated"
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        halves = [cells.detach().cpu().to(torch.float16).contiguous() for cells in self.cells]
        object.__setattr__(self, "cells", halves)
        object.__setattr__(self, "tasks", tuple(_on_cpu(task) for task in self.tasks))
        check_parts(self)

    @property
    def cells_bytes(self) -> int:
        """Bytes of the ring cells: what the paper counts as the prompt."""
        return sum(cells.numel() * cells.element_size() for cells in self.cells)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the calibrated BatchNorm statistics of all tasks."""
        return sum(
            value.numel() * value.element_size()
            for task in self.tasks
            for value in (task.statistics or {}).values()
        )

    def task(self, name: str) -> ArtefactTask:
        """A task by its name."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise unknown_name("task", name, [task.name for task in self.tasks], ArtefactError)

    def prompt(self) -> Prompt:
        """The rings as a frozen module, fp32."""
        prompt = Prompt(self.side, self.rings, self.cells[0].shape[0])
        with torch.no_grad():
            for parameter, cells in zip(prompt.cells, self.cells, strict=True):
                parameter.copy_(cells)
        return prompt.requires_grad_(False)

    def on(
        self, model: Source | nn.Module, *, check: bool = True, batchnorm: str | None = None
    ) -> ServedPrompt:
        """Put the prompt on model A.

        Args:
            model: A; it is put in eval mode and its gradients are switched off.
            check: compare its sha256 with the one in the file.
            batchnorm: serve under another policy than the artefact's.

        Raises:
            ArtefactError: the model is not the one the prompt was made for, or the policy needs
                statistics that are not in the file; no such policy.
        """
        policy = self.batchnorm if batchnorm is None else batchnorm
        if policy not in BATCHNORM_POLICIES:
            raise unknown_name("BatchNorm policy", policy, BATCHNORM_POLICIES, ArtefactError)
        return ServedPrompt(model, self.prompt(), self.tasks, policy, self.target, check=check)


def save_prompt(path: str | Path, artefact: Artefact) -> None:
    """Write ``artefact`` to ``path`` atomically; equal artefacts give equal bytes."""
    tensors = _tensors(artefact)
    content = _content(artefact)
    header = {"version": artefact.version, "sha256": _digest(content, tensors), "content": content}
    text = json.dumps(header, sort_keys=True)
    atomic_write(Path(path), safetensors.torch.save(tensors, metadata={_KEY: text}))


def prompt_file(path: Path) -> Path:
    """The prompt in a run folder, or ``path`` itself."""
    return path / "prompt.safetensors" if path.is_dir() else path


def load_prompt(path: str | Path) -> Artefact:
    """Read an artefact; nothing in the file is executed.

    Args:
        path: the file, or its run folder.

    Raises:
        ArtefactError: no such file, damaged, not a prompt file, or of another format version.
    """
    path = prompt_file(Path(path))
    header, tensors = _read(path)
    try:
        content = header["content"]
        if _digest(content, tensors) != header["sha256"]:
            raise _damaged(path, "its checksum does not match its content")
        return _artefact(content, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, KiopError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _on_cpu(task: ArtefactTask) -> ArtefactTask:
    statistics = task.statistics
    if statistics is not None:
        statistics = {k: v.detach().cpu().float().contiguous() for k, v in statistics.items()}
    mapping = task.mapping
    if mapping is not None:
        mapping = mapping.detach().cpu().long().contiguous()
    return dataclasses.replace(task, mapping=mapping, statistics=statistics)


def _tensors(artefact: Artefact) -> dict[str, Tensor]:
    tensors = {f"ring.{k}": cells for k, cells in enumerate(artefact.cells, start=1)}
    for i, task in enumerate(artefact.tasks):
        if task.mapping is not None:
            tensors[f"task.{i}.mapping"] = task.mapping
        for name, value in (task.statistics or {}).items():
            tensors[f"task.{i}.statistics.{name}"] = value
    return tensors


def _content(artefact: Artefact) -> dict[str, Any]:
    tasks = [
        {
            "name": task.name,
            "depth": task.depth,
            "mapping": task.mapping is not None,
            "statistics": None if task.statistics is None else sorted(task.statistics),
            "info": dataclasses.asdict(task.info),
        }
        for task in artefact.tasks
    ]
    content = {
        "side": artefact.side,
        "rings": artefact.rings,
        "tasks": tasks,
        "target": dataclasses.asdict(artefact.target),
        "batchnorm": artefact.batchnorm,
        "config": artefact.config,
        "versions": artefact.versions,
        "metrics": artefact.metrics,
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _artefact(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Artefact:
    tasks = tuple(
        ArtefactTask(
            fact["name"],
            fact["depth"],
            tensors[f"task.{i}.mapping"] if fact["mapping"] else None,
            None
            if fact["statistics"] is None
            else {name: tensors[f"task.{i}.statistics.{name}"] for name in fact["statistics"]},
            _info(fact["info"]),
        )
        for i, fact in enumerate(content["tasks"])
    )
    target = {**content["target"], "info": _info(content["target"]["info"])}
    return Artefact(
        side=content["side"],
        rings=tuple(content["rings"]),
        cells=[tensors[f"ring.{k}"] for k in range(1, len(content["rings"]) + 1)],
        tasks=tasks,
        target=ArtefactTarget(**target),
        batchnorm=content["batchnorm"],
        config=content["config"],
        versions=content["versions"],
        metrics=content["metrics"],
    )


def _info(facts: Mapping[str, Any]) -> DatasetInfo:
    tuples = {key: tuple(facts[key]) for key in ("classes", "mean", "std")}
    return DatasetInfo(**{**facts, **tuples})


def _digest(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of this format and version."""
    if not path.is_file():
        raise ArtefactError("no such prompt file", got=path, expected="a prompt.safetensors",
                            fix="check the path; kiop-fast train writes one")  # fmt: skip
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ArtefactError(
                    "this is no prompt file", got=path,
                    expected=f"safetensors with {_KEY!r} in its header",
                    fix="give the prompt.safetensors of a run folder",
                )  # fmt: skip
            header = json.loads(text)
            version = header["version"]
            if version != FORMAT_VERSION:
                raise ArtefactError(
                    "the prompt file is of another format version", got=f"{path}: {version}",
                    expected=FORMAT_VERSION, fix="use the kiop_fast that wrote it, or a newer one",
                )  # fmt: skip
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: str | Path, why: str) -> ArtefactError:
    return ArtefactError(
        "the prompt file is damaged", got=f"{path}: {why}",
        expected="an unchanged prompt.safetensors", fix="copy it again, or train it again",
    )  # fmt: skip
