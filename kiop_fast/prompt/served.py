"""A prompt on its model: one ``nn.Module`` a task, ready for images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import ArtefactError, DataError, unknown_name
from kiop_fast.prompt.rings import Prompt
from kiop_fast.prompt.windowed import pays, windowed
from kiop_fast.source import Source, fingerprint, normalising_layers
from kiop_fast.source.frozen import bare, is_rowwise

# Part of a canvas up to which its images are served through a window.  Without gradients a window
# saves less; two cores, against the whole canvas: ResNet-18, 32 → 128 (0.06), 64 images, 407 →
# 307 ms; resnet8, 16 → 32 (0.25), 8 images, 2.4 → 2.8 ms.
_WINDOWED = 0.15


@dataclass(frozen=True)
class ArtefactTask:
    """One job that the prompted model does.

    Attributes:
        name: unique among the tasks; the dataset's name where that is.
        depth: how many rings its images pass.
        mapping: (classes of the task,) int64 into A's classes; None keeps A's own.
        statistics: calibrated BatchNorm statistics by A's buffer names, fp32; None where the
            policy needs none.
        info: classes, channels and normaliser of its images.
    """

    name: str
    depth: int
    mapping: Tensor | None
    statistics: Mapping[str, Tensor] | None
    info: DatasetInfo


@dataclass(frozen=True)
class ArtefactTarget:
    """Model A, by its facts and fingerprint; its weights are not in the file.

    Attributes:
        arch, name: as in :class:`kiop_fast.source.Source`.
        sha256: over all its parameters and buffers.
        info: the data it was trained on.
    """

    arch: str
    name: str
    sha256: str
    info: DatasetInfo

    @property
    def classes(self) -> int:
        """How many outputs it has."""
        return len(self.info.classes)


class ServedPrompt:
    """Model A wearing a prompt; :meth:`task` gives a module for each of its jobs.

    Args:
        model: A, or a Source around it; put in eval mode, its gradients switched off.
        prompt: the rings.
        tasks: the jobs.
        batchnorm: calibrated | running | batch.
        target: facts about A.
        check: compare the model's sha256 with the target's.

    Raises:
        ArtefactError: another model, or one without the layers that the statistics name.
    """

    def __init__(
        self,
        model: Source | nn.Module,
        prompt: Prompt,
        tasks: Sequence[ArtefactTask],
        batchnorm: str,
        target: ArtefactTarget,
        *,
        check: bool = True,
    ) -> None:
        module = bare(model.model if isinstance(model, Source) else model)
        module.eval().requires_grad_(False)
        found = fingerprint(module) if check else target.sha256
        if found != target.sha256:
            raise ArtefactError(
                "this is not the model that the prompt was made for",
                got=f"{type(module).__name__} in {_dtypes(module)} with sha256 {found[:16]}…",
                expected=f"{target.name} with sha256 {target.sha256[:16]}…",
                fix="load the target's own checkpoint (--target); check=False tries anyway",
            )
        rowwise = is_rowwise(module, target.info.side)
        self.target = Source(target.name, target.arch, module, target.info, found, rowwise=rowwise)
        self.prompt, self.tasks, self.batchnorm = prompt, tuple(tasks), batchnorm
        self.prompt.to(next(module.parameters()).device)

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.tasks]

    def task(self, name: str) -> PromptedTask:
        """The module that does one job."""
        for task in self.tasks:
            if task.name == name:
                return PromptedTask(self.target, self.prompt, task, self.batchnorm)
        raise unknown_name("task", name, self.names, ArtefactError)


class PromptedTask(nn.Module):
    """A through the prompt, as a classifier of one task: images in, logits out.

    Under ``calibrated`` and ``running`` an image's logits do not depend on the rest of its batch;
    under ``batch``, as upstream evaluates, they do.  It stays as it is made: frozen.  Tasks of one
    model have its weights in common and may be called at once, each from a thread of its own; with
    one of them A moves to another device; another dtype gives the task a copy of its own.

    Attributes:
        model: A with the task's BatchNorm statistics.
        name: the task's name.
        classes: class names of the task, in the order of the logits.
        side: image side it takes, pixels.
        info: facts about the task's data.
    """

    def __init__(self, target: Source, prompt: Prompt, task: ArtefactTask, batchnorm: str) -> None:
        super().__init__()
        statistics: Mapping[str, Tensor] | None = {}  # A's own
        if batchnorm == "calibrated":
            _check_statistics(target.model, task)
            statistics = task.statistics
        elif batchnorm == "batch":
            statistics = None
        worn = target.with_statistics(statistics)
        self.model, self.prompt = worn.model, prompt
        self.name, self.info, self.side = task.name, task.info, prompt.side
        self.classes = task.info.classes
        self.depth, self.batchnorm = task.depth, batchnorm
        self.corner = prompt.corner(task.depth)
        self._target: Source | None = target
        self._worn = worn
        device = next(target.model.parameters()).device
        buffers = {
            "mean": torch.tensor(task.info.mean).view(3, 1, 1),
            "std": torch.tensor(task.info.std).view(3, 1, 1),
            "mapping": task.mapping,
            "border": prompt.border(task.depth)
            .detach()
            .contiguous(memory_format=torch.channels_last),
        }
        for name, value in buffers.items():
            held = None if value is None else value.to(device)
            self.register_buffer(name, held, persistent=False)
        self.training = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptedTask:
        some = next(self.model.parameters())
        if fn(some.new_empty(0)).dtype != some.dtype:  # A's weights may not change
            self._worn = replace(self._worn, model=copy.deepcopy(self.model))
            self.model, self.prompt = self._worn.model, copy.deepcopy(self.prompt)
            self._target = None
        super()._apply(fn, recurse)
        if self._target is not None:  # its parameters are here, its buffers are not
            self._target.model._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> PromptedTask:
        """Stays in eval mode: a served model is frozen."""
        return self

    def canvas(self, images: Tensor) -> Tensor:
        """Images as A sees them: normalised, inside the rings; (N, 3, S, S)."""
        return self._canvas(self._normalised(images))

    def _canvas(self, normalised: Tensor) -> Tensor:
        border = self.get_buffer("border").expand(normalised.shape[0], -1, -1, -1)
        canvas = border.clone(memory_format=torch.channels_last)
        inside = slice(self.corner, self.corner + self.side)
        canvas[:, :, inside, inside] = normalised
        return canvas

    def target_logits(self, images: Tensor) -> Tensor:
        """(N, C, s, s) → A's own logits, not mapped; (N, classes of A)."""
        images, border = self._normalised(images), self.get_buffer("border")
        if pays(images, border.shape[-1], _WINDOWED):
            return self._worn.logits(windowed(border, images, self.corner))
        return self._worn.logits(self._canvas(images))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (N, 3, s, s) or (N, 1, s, s), uint8 or float in [0, 1].  One channel is
                repeated; three channels of a grey task are averaged.

        Returns:
            logits (N, classes of the task).

        Raises:
            DataError: another shape or dtype.
        """
        logits, mapping = self.target_logits(images), self._buffers["mapping"]
        return logits if mapping is None else logits[:, mapping]

    def _normalised(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (
            self.side, self.side
        ):  # fmt: skip
            raise DataError(
                f"task {self.name!r} cannot take these images",
                got=f"shape {tuple(images.shape)}",
                expected=f"(N, 1, {self.side}, {self.side}) or (N, 3, {self.side}, {self.side})",
                fix=f"resize them to {self.side} × {self.side}, grey or RGB, and stack them",
            )
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        if images.dtype == torch.uint8:
            images = images.to(mean.dtype) / 255
        elif not images.is_floating_point():
            raise DataError(
                f"task {self.name!r} cannot take images of this dtype",
                got=images.dtype,
                expected="uint8, or floating point in [0, 1]",
            )
        if self.info.channels == 1 and images.shape[1] == 3:
            images = images.mean(dim=1, keepdim=True)
        normalised = (images.to(mean.dtype) - mean) / std
        return normalised.contiguous(memory_format=torch.channels_last)


def _dtypes(model: nn.Module) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return " and ".join(sorted(found))


def _check_statistics(model: nn.Module, task: ArtefactTask) -> None:
    """Raise ArtefactError unless the task's statistics cover the model's BatchNorm layers."""
    if task.statistics is None:
        raise ArtefactError(
            f"task {task.name!r} has no calibrated BatchNorm statistics",
            expected="statistics in the prompt file, written by a run with the calibrated policy",
            fix="serve it with batchnorm='running' or 'batch'",
        )
    wanted = {
        f"{name}.{part}": tuple(layer.running_mean.shape)
        for name, layer in normalising_layers(model).items()
        for part in ("running_mean", "running_var")
        if layer.running_mean is not None
    }
    found = {name: tuple(value.shape) for name, value in task.statistics.items()}
    if wanted != found:
        other = sorted(set(wanted.items()) ^ set(found.items()))
        raise ArtefactError(
            f"task {task.name!r}: the BatchNorm statistics do not fit this model",
            got=f"{len(found)} tensors, e.g. {other[0][0]}", expected=f"{len(wanted)} tensors",
            fix="use the target's architecture",
        )  # fmt: skip
