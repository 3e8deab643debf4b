"""Library use: your own modules in, a prompt out; nothing you gave is changed."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.config import RunConfig
from kiop_fast.config_io import merge, override
from kiop_fast.data import Dataset, DatasetInfo, dataset
from kiop_fast.errors import ConfigError, SourceError
from kiop_fast.pipeline import RunResult, train
from kiop_fast.presets import preset as named_preset
from kiop_fast.prompt.artefact import Artefact, load_prompt
from kiop_fast.run import Run
from kiop_fast.runtime.device import choose_device
from kiop_fast.source import Source, freeze
from kiop_fast.source.frozen import bare
from kiop_fast.source.zoo import probe
from kiop_fast.sources import Sources

Facts = DatasetInfo | Dataset | str
TARGET = "target"  # the key under which ``data`` describes model A


class Callback:
    """What :class:`KiOP` tells while it works; override what you want to hear."""

    def on_step(self, stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        """Every tenth step of a stage, and its last."""

    def on_epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """After an epoch: its record of ``metrics.jsonl`` and of ``timings.jsonl``."""

    def on_end(self, prompt: Artefact) -> None:
        """After the last epoch."""


class LogCallback(Callback):
    """One log line an epoch, through :mod:`logging` (logger ``kiop_fast``)."""

    def on_epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        losses = "  ".join(f"{name} {value:.4g}" for name, value in metrics["loss"].items())
        logging.getLogger("kiop_fast").info(
            "epoch %d  %.1f s  %s", metrics["epoch"], timings["seconds"], losses
        )


class KiOP:
    """Learns one prompt through which ``target`` also does the jobs of the ``providers``.

    The models are copied: yours keep their mode, gradients, device and memory layout.

    Args:
        target: model A, (N, 3, s, s) normalised → (N, classes), at side s and at every ring's.
        providers: by the name of their task; a classifier with BatchNorm2d layers each.
        side: image side s, pixels; by default the preset's.
        data: facts about the images a model was trained on, by task name (``"target"`` for A's):
            a :class:`DatasetInfo`, a :class:`Dataset` or the name of a known one.  A model
            without them is taken to expect images in [0, 1], and its classes are numbered.
        preset: where the settings start from (``kiop-fast presets``).
        device: where to compute; by default where ``target`` lies.
        out: run folder that is kept; by default a temporary one.
        callbacks: told about steps and epochs.
        settings: any setting, nested as in a config file: ``epochs=3``, ``storing={"lr": 0.5}``;
            ``evaluation.every`` is 0 unless given.

    Attributes:
        config: all settings of the run.
        result: what the last :meth:`fit` left behind; None before.

    Raises:
        SourceError: a model is no classifier for these sides, or lies on several devices.
        ConfigError: settings that cannot be run.
    """

    def __init__(
        self,
        target: nn.Module | Source,
        providers: Mapping[str, nn.Module | Source],
        *,
        side: int | None = None,
        data: Mapping[str, Facts] | None = None,
        preset: str = "paper-bf",
        device: str | torch.device | None = None,
        out: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        **settings: Any,
    ) -> None:
        _check_names(providers, data or {})
        place = choose_device(str(device)) if device is not None else _device(target, TARGET)
        changes: dict[str, Any] = {"target": "", "providers": [], "device": str(place)}
        if side is not None:
            changes["side"] = side
        start = override(named_preset(preset), {"evaluation": {"every": 0}})
        base = override(start, merge(settings, changes))
        if base.mode == "vanilla":
            raise ConfigError("mode vanilla learns no prompt", got="mode='vanilla'",
                              expected="bf, b or t", fix="use kiop_fast.train")  # fmt: skip
        facts = dict(data or {})
        sides = (base.side, *base.prompt.rings)
        own = _source(target, TARGET, facts.get(TARGET), sides, place)
        others = tuple(
            _source(model, name, facts.get(name), sides[:1], place)
            for name, model in providers.items()
        )
        _check_task_names(own.info.task, {source.info.name: source.info.task for source in others})
        named = {"target": own.name, "providers": [source.name for source in others]}
        self.config: RunConfig = override(base, named)
        self.sources = Sources(own, others)
        self.out = None if out is None else Path(out)
        self.callbacks = tuple(callbacks)
        self.result: RunResult | None = None

    def fit(self, *, resume: bool = False) -> Artefact:
        """Run all epochs.

        Args:
            resume: continue the run in ``out`` if there is one.

        Returns:
            The prompt: ``.on(model).task(name)`` is an ``nn.Module``.
        """
        if self.out is not None:
            return self._fit(self.out, resume)
        with tempfile.TemporaryDirectory() as folder:
            return self._fit(Path(folder) / "run", resume)

    def _fit(self, out: Path, resume: bool) -> Artefact:
        self.result = train(
            self.config, out, sources=self.sources, resume=resume,
            progress=self._on_step if self.callbacks else None, on_epoch=self._on_epoch,
        )  # fmt: skip
        assert self.result.artefact is not None
        prompt = load_prompt(self.result.artefact)
        for callback in self.callbacks:
            callback.on_end(prompt)
        return prompt

    def _on_step(self, stage: str, done: int, total: int, **losses: float) -> None:
        for callback in self.callbacks:
            callback.on_step(stage, done, total, losses)

    def _on_epoch(self, run: Run, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_epoch(metrics, timings)


def _check_names(providers: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    if not providers or TARGET in providers:
        raise ConfigError("KiOP takes one model or more by the name of its task",
                          got=list(providers), expected=f"names other than {TARGET!r}",
                          fix='for example providers={"digits": model_b}')  # fmt: skip
    strange = sorted(set(data) - {TARGET, *providers})
    if strange:
        raise ConfigError(
            "data describes models that are not there",
            got=strange,
            expected=[TARGET, *providers],
            fix="use the names of the tasks",
        )


def _check_task_names(own: str, tasks: Mapping[str, str]) -> None:
    """A provider's task goes by the name that was given for it."""
    for given, name in tasks.items():
        if given != name or given == own:
            raise ConfigError(
                f"a provider's task cannot be called {given!r}",
                got="the name of the target's own task" if given == own else "a path",
                expected="a name of its own, without / and not of dots alone",
                fix="give it another name, and its data as data={name: …}",
            )


def _device(model: nn.Module | Source, name: str) -> torch.device:
    """The one device that a model lies on; the CPU for a model without tensors."""
    module = model.model if isinstance(model, Source) else model
    found = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(found) > 1:
        raise SourceError(
            f"model {name!r} lies on several devices",
            got=sorted(map(str, found)),
            expected="one device",
            fix="move it to one: model.to('cuda:0')",
        )
    return found.pop() if found else torch.device("cpu")


def _source(
    model: nn.Module | Source, name: str, facts: Facts | None, sides: tuple[int, ...],
    device: torch.device,
) -> Source:  # fmt: skip
    """A frozen copy of ``model`` on ``device``, with its facts, tried at every side."""
    _device(model, name)
    if isinstance(model, Source):
        return replace(model, model=copy.deepcopy(model.model).to(device))
    module = copy.deepcopy(bare(model)).to(device)
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if kinds - {torch.float32}:
        raise SourceError(f"model {name!r} is not in single precision", got=sorted(map(str, kinds)),
                          expected="torch.float32", fix="give model.float()")  # fmt: skip
    classes = _classes(module, name, sides[0], device)
    info = _info(facts, name, classes, sides[0])
    info = info if name == TARGET else replace(info, name=name)
    for side in sides:
        probe(module, f"model {name!r}", classes, side)
    return freeze(module, info, name=f"{type(module).__name__}@{name}", arch=type(module).__name__)


def _classes(module: nn.Module, name: str, side: int, device: torch.device) -> int:
    """How many outputs it has, asked with two blank images."""
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, 3, side, side, device=device))
    except Exception as error:
        raise SourceError(
            f"model {name!r} does not accept images of {side} pixels",
            got=f"{type(error).__name__}: {error}",
            expected=f"(2, 3, {side}, {side})",
            fix="set side to the one it was trained at",
        ) from None
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SourceError(
            f"model {name!r} is no classifier",
            got=shape,
            expected="logits (N, classes)",
            fix="wrap it so that it returns logits",
        )
    return output.shape[1]


def _info(facts: Facts | None, name: str, classes: int, side: int) -> DatasetInfo:
    if facts is None:
        return DatasetInfo(name, side, 3, tuple(map(str, range(classes))))
    found = dataset(facts) if isinstance(facts, str) else facts
    info = found.info if isinstance(found, Dataset) else found
    if len(info.classes) != classes:
        raise SourceError(f"model {name!r} and its data do not fit together",
                          got=f"{classes} outputs, {len(info.classes)} classes of {info.name!r}",
                          expected="one output a class",
                          fix="name the data it was trained on")  # fmt: skip
    return info
