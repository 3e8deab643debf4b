"""The story in one screen: synthesize, map, store, evaluate, save, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kiop_fast.config import RunConfig, to_dict
from kiop_fast.config_io import dump_toml
from kiop_fast.data import dali
from kiop_fast.deliver.evaluate import (
    has_test_data,
    require_test_data,
    source_accuracy,
    task_accuracy,
)
from kiop_fast.errors import ArtefactError, ConfigError
from kiop_fast.prompt.artefact import (
    Artefact,
    ArtefactTarget,
    ArtefactTask,
    load_prompt,
    save_prompt,
)
from kiop_fast.remapping import made_anew, remap
from kiop_fast.run import Run
from kiop_fast.run_state import restore, run_state
from kiop_fast.runtime.device import choose_device, use_threads
from kiop_fast.runtime.files import save_tensors
from kiop_fast.runtime.memory import explained_memory
from kiop_fast.runtime.profile import Profiles, Row
from kiop_fast.runtime.progress import Progress
from kiop_fast.runtime.run_folder import RunFolder
from kiop_fast.runtime.versions import versions
from kiop_fast.source import Source
from kiop_fast.source.classifier import with_original_classifier
from kiop_fast.sources import Sources, load_sources

OnEpoch = Callable[[Run, dict[str, Any], dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind.

    Attributes:
        out: the run folder.
        artefact: the prompt's file; None in mode ``vanilla``.
        accuracy: of every task after the last epoch, by name; empty if never evaluated.
        metrics: one record an epoch.
        seconds: wall time of this call.
        profile: of every period that was profiled: stage, ms a step, GFLOP/s, GB/s.
    """

    out: Path
    artefact: Path | None
    accuracy: dict[str, float]
    metrics: list[dict[str, Any]]
    seconds: float
    profile: dict[str, list[Row]] = field(default_factory=dict)


def train(
    config: RunConfig, out: Path, *, sources: Sources | None = None, resume: bool = False,
    progress: Progress | None = None, prepare: Callable[[Run], None] | None = None,
    on_epoch: OnEpoch | None = None, profile: bool = False,
) -> RunResult:  # fmt: skip
    """Run ``config`` from its first (or, resuming, its next) epoch to its last.

    Args:
        config: what to run.
        out: the run folder.
        sources: frozen models; by default those named in ``config``.
        resume: continue the run in ``out`` if there is one.
        progress: called as ``progress(stage, done, total, **values)``.
        prepare: called once with the new run, before anything is restored or computed.
        on_epoch: called as ``on_epoch(run, metrics, timings)`` after an epoch, before it is
            committed to the folder; what it adds to ``metrics`` is kept.
        profile: trace the first steps of every period into the folder ``profile``.

    Raises:
        OutOfMemoryError: a device's memory does not hold the run.
    """
    began = time.perf_counter()
    device = choose_device(config.device)
    use_threads(config.threads)
    if "dali" in (config.loading.loader, config.storing.replay):
        dali.chosen("dali")  # an error now rather than after an epoch
    inner = load_inner(config)
    folder = RunFolder(out, dump_toml(config), config.digest(), resume=resume)
    if sources is None:
        rings = (*(inner.rings if inner else ()), *config.prompt.rings)
        sources = load_sources(config, rings, device, progress)
    if inner is not None:
        _check_target(inner, sources.target)
    prints = sources.fingerprints()
    restored = folder.restored(prints)
    if config.evaluation.every:
        for source in (sources.target, *sources.providers):
            require_test_data(source.info, config.side)
    with explained_memory():
        run = Run(config, sources, device, folder.path / "scratch", inner)
    if prepare is not None:
        prepare(run)
    folder.begin()
    if restored:
        restore(run, restored, folder.bank)
    if profile:
        run.profiles = Profiles(folder.path / "profile")
    for epoch in range(folder.epochs_done, config.epochs):
        with explained_memory():
            metrics, timings = train_epoch(run, folder, epoch, progress)
        if on_epoch is not None:
            on_epoch(run, metrics, timings)
        folder.save_epoch(metrics, timings, run_state(run), prints)
    sources.check_unchanged()
    artefact = save_result(run, folder)
    folder.clear_scratch()
    accuracy = folder.metrics[-1].get("accuracy", {})
    profiled = run.profiles.rows() if run.profiles else {}
    seconds = time.perf_counter() - began
    return RunResult(out, artefact, accuracy, folder.metrics, seconds, profiled)


def train_epoch(
    run: Run, folder: RunFolder, epoch: int, progress: Progress | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One epoch; its metrics and its timings."""
    clock = _Clock()
    rounds = run.config.rounds
    made: dict[str, list[Any]] = {}
    before = made_anew(run, epoch * rounds)
    for turn in range(epoch * rounds, (epoch + 1) * rounds):
        losses, new = run.synthesize(turn, progress)
        for task, tensors in new.items():
            made.setdefault(task, []).append(tensors)
        clock.lap("synthesize")
        remap(run, turn)
        transfer, agreement = run.store(turn, progress)
        clock.lap("store")
    for task, parts in made.items():
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        folder.save_bank(task, epoch, whole)
    metrics: dict[str, Any] = {"epoch": epoch + 1}
    every, last = run.config.evaluation.every, epoch + 1 == run.config.epochs
    if every and (last or (epoch + 1) % every == 0):
        metrics["accuracy"] = accuracies(run)
        clock.lap("evaluate")
    now = made_anew(run, epoch * rounds)
    changed = {name: int((now[name] != mapping).sum()) for name, mapping in before.items()}
    metrics |= {"loss": losses | transfer, "agreement": agreement, "mapping_changed": changed}
    return metrics, {"epoch": epoch + 1} | clock.seconds()


def deliver(run: Run, metrics: Mapping[str, Any] | None = None) -> Artefact:
    """The artefact as it stands: rounded cells, mappings, calibrated statistics."""
    prompt, config = run.delivered_prompt(), run.config
    tasks = list(run.inner.tasks) if run.inner else []
    if config.mode == "t":
        # A's own task is not trained in this mode; the only images there are serve its statistics.
        own = replace(run.tasks[0], mapping=None, depth=1)
        info = run.sources.target.info
        tasks.append(ArtefactTask(info.task, 1, None, run.statistics(own, prompt), info))
    for task in run.tasks:
        mapping = None if task.mapping is None else task.mapping.cpu()
        statistics = run.statistics(task, prompt)
        tasks.append(ArtefactTask(task.name, task.depth, mapping, statistics, task.source.info))
    target = run.sources.target
    return Artefact(
        side=config.side,
        rings=prompt.rings,
        cells=[cells.detach().cpu() for cells in prompt.cells],
        tasks=tuple(tasks),
        target=ArtefactTarget(target.arch, target.name, target.sha256, target.info),
        batchnorm=config.prompt.batchnorm,
        config=to_dict(config),
        versions=versions(),
        metrics=dict(metrics or {}),
    )


def accuracies(run: Run) -> dict[str, float]:
    """Accuracy of every task on its test data, of what would be delivered now."""
    config, batch = run.config, run.config.evaluation.batch
    if run.student is not None:
        own, theirs = run.sources.target, run.sources.providers[0]
        student = run.student.eval()
        pairs = [(own, with_original_classifier(student, own)), (theirs, student)]
        return {
            source.info.task: source_accuracy(
                replace(source, model=model), config.side, batch, config.loading
            )
            for source, model in pairs
            if has_test_data(source.info)
        }
    served = deliver(run).on(run.sources.target, check=False)
    return {
        task.name: task_accuracy(
            served.task(task.name), task.info, config.side, batch, run.device, config.loading
        )
        for task in served.tasks
        if has_test_data(task.info)
    }


def save_result(run: Run, folder: RunFolder) -> Path | None:
    """Write ``prompt.safetensors`` (mode ``vanilla``: ``student.safetensors``)."""
    if run.student is not None:
        save_tensors(folder.path / "student.safetensors", run.student.state_dict(), {})
        return None
    path = folder.path / "prompt.safetensors"
    save_prompt(path, deliver(run, folder.metrics[-1]))
    return path


def load_inner(config: RunConfig) -> Artefact | None:
    """The prompt that ``prompt.extend`` names, checked against the config."""
    if not config.prompt.extend:
        return None
    inner = load_prompt(Path(config.prompt.extend))
    if config.mode != "bf":
        raise ConfigError("a prompt can only be extended in mode bf", got=config.mode)
    if inner.batchnorm != config.prompt.batchnorm or inner.side != config.side:
        raise ArtefactError(
            "the prompt to extend was made under other settings",
            got=f"side {inner.side}, batchnorm {inner.batchnorm}",
            expected=f"side {config.side}, batchnorm {config.prompt.batchnorm}",
            fix="set side and prompt.batchnorm to those of the prompt",
        )
    if inner.rings[-1] >= config.prompt.rings[0]:
        raise ConfigError(
            "prompt.rings lists the new rings only, and they go around the old ones",
            got=f"old rings {list(inner.rings)}, new rings {list(config.prompt.rings)}",
            expected=f"new rings larger than {inner.rings[-1]}",
            fix=f"for example prompt.rings=[{inner.rings[-1] + 8}]",
        )
    if len(config.prompt.rings) != len(config.providers):
        raise ConfigError(
            "extending takes one new ring a provider",
            got=f"{len(config.prompt.rings)} new rings, {len(config.providers)} providers",
        )
    return inner


def _check_target(inner: Artefact, target: Source) -> None:
    """A prompt is extended for the model it was made for; its tasks stay as they are."""
    if inner.target.sha256 != target.sha256:
        raise ArtefactError(
            "the prompt to extend was made for another target",
            got=f"{target.name} with sha256 {target.sha256[:16]}…",
            expected=f"{inner.target.name} with sha256 {inner.target.sha256[:16]}…",
            fix=f"give that model: --target {inner.config.get('target', 'NAME=PATH')}",
        )


class _Clock:
    """Wall seconds between laps."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._start} | self._laps
