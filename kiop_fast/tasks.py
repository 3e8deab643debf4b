"""The tasks of a run: whose knowledge, how many rings, which bank, which mapping."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiop_fast.config import RunConfig
from kiop_fast.data import (
    Feed,
    FileBank,
    FileSplit,
    Split,
    dali,
    dataset,
    held,
    open_feed,
    uses_dali,
)
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.engine import Engine
from kiop_fast.prompt import check_class_counts, disjoint_mappings, random_mapping
from kiop_fast.prompt.artefact import Artefact
from kiop_fast.runtime import draws
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.offload import Tenant
from kiop_fast.source import Source, check_each_runs_once
from kiop_fast.sources import Sources
from kiop_fast.store import augmentation
from kiop_fast.synthesize import ImageBank, MetaStart, generator_channels


@dataclass
class Task:
    """One job of the prompted model.

    Attributes:
        name: the dataset's name, made unique within the run.
        source: whose knowledge it is (A itself for A's own task).
        depth: rings its images pass.
        mapping: A's class for each class of the provider; None for A's own task.
        weight: α or β of the transfer loss.
        bank: its images, in the engine's store.
        synthesizer: makes them; None where real data stands in (mode b).
        epochs: in which it makes them, from the first on.
        start: where its generators start; None: anew at every call.
        feed: makes the bank's batches where the kernel ``bank_replay`` does not.
        tenant: what the synthesizer keeps from call to call, if the tasks have one place on the
            device for it in turns (setting ``offload``).
    """

    name: str
    source: Source
    depth: int
    mapping: Tensor | None
    weight: float
    bank: Any
    synthesizer: Any
    epochs: int = 0
    start: MetaStart | None = None
    feed: Feed | None = None
    tenant: Tenant | None = None

    def enter(self) -> None:
        """From now on the synthesizer's tensors hold this task's values, no other's."""
        if self.tenant is not None:
            self.tenant.enter()


# The statistics that the authors' scripts normalise synthetic images with, where these differ
# from what the source was trained with (registry.NORMALIZE_DICT upstream; SPEC section 9).
_UPSTREAM_INVERSION = {"mnist": (0.1307, 0.3081), "fmnist": (0.1307, 0.3081), "svhn": (0.5, 0.5)}


def synthesis_normaliser(config: RunConfig, sources: Sources, source: Source) -> DatasetInfo:
    """Statistics for a task's synthetic images: its own, or upstream's choice (the provider's)."""
    if config.synthesis.normaliser == "own":
        return source.info
    info = sources.providers[0].info if source is sources.target else source.info
    mean, std = _UPSTREAM_INVERSION.get(info.name, (None, None))
    if mean is None or std is None:
        return info
    return replace(info, mean=(mean,) * 3, std=(std,) * 3)


def make_tasks(
    config: RunConfig, sources: Sources, engine: Engine, *, inner: Artefact | None,
    device: torch.device, scratch: Path, execution: dict[str, Execution],
) -> list[Task]:  # fmt: skip
    """Every task that this run trains, A's own first.

    Args:
        inner: an earlier prompt that stays inside as it is; A's own task is then done already.
        scratch: folder for the reference engine's images.
        execution: as :meth:`~kiop_fast.engine.Engine.execution` gives it.

    Raises:
        MappingError: an injective mapping is impossible.
        SourceError: a source has no BatchNorm layer.
    """
    inner_rings = len(inner.rings) if inner else 0
    taken = [task.name for task in inner.tasks] if inner else []
    names = _unique_names([sources.target, *sources.providers], taken)
    tasks = []
    if config.mode in ("bf", "b") and not inner_rings:
        tasks.append(_task(config, sources, engine, names[0], sources.target, 1, None,
                           config.storing.alpha, device, scratch, execution))  # fmt: skip
    mappings = initial_mappings(config, sources, names[1:])
    for i, (name, provider) in enumerate(zip(names[1:], sources.providers, strict=True)):
        depth = provider_depth(config, i, inner_rings)
        tasks.append(_task(config, sources, engine, name, provider, depth, mappings[i],
                           config.storing.beta, device, scratch, execution))  # fmt: skip
    return tasks


def provider_depth(config: RunConfig, index: int, inner_rings: int) -> int:
    """Rings that provider ``index`` (from 0) looks through."""
    if inner_rings:
        return inner_rings + index + 1
    if config.mode == "t" or len(config.prompt.rings) == 1:
        return min(index + 1, len(config.prompt.rings))
    return index + 2


def initial_mappings(config: RunConfig, sources: Sources, names: list[str]) -> list[Tensor | None]:
    """Random mappings (RLM); the other rules replace them once there are banks."""
    if config.mode == "vanilla":
        return [None] * len(names)
    target = sources.target
    counts = [provider.classes for provider in sources.providers]
    for provider in sources.providers:
        check_class_counts(target.classes, provider.classes, (target.name, provider.name))
    if config.prompt.disjoint:
        rng = draws.generator(config.seed, 0, "all providers", "mapping")
        return list(disjoint_mappings(rng, target.classes, counts))
    return [
        random_mapping(draws.generator(config.seed, 0, name, "mapping"), target.classes, count)
        for name, count in zip(names, counts, strict=True)
    ]


def _task(
    config: RunConfig, sources: Sources, engine: Engine, name: str, source: Source, depth: int,
    mapping: Tensor | None, weight: float, device: torch.device, scratch: Path,
    execution: dict[str, Execution],
) -> Task:  # fmt: skip
    if source is sources.target and config.mode == "b":
        bank, feed = _real_images(config, source, device)
        return Task(name, source, depth, mapping, weight, bank, None, feed=feed)
    check_each_runs_once(source.model, config.side)
    period = config.synthesis
    own = source is sources.target
    epochs = period.epochs_for(own_task=own, epochs=config.epochs)
    images = epochs * config.rounds * period.calls * period.batch
    synthesizer = engine.synthesizer(
        source, period, synthesis_normaliser(config, sources, source), side=config.side,
        bank_rows=min(period.bank_rows, images), seed=config.seed, task=name, device=device,
        **execution,
    )  # fmt: skip
    mapping = None if mapping is None else mapping.to(device)
    channels = generator_channels(period, source)
    bank = engine.image_bank(channels, config.side, device, scratch / name, capacity=images)
    feed = _dali_replay(config, source, bank, channels, device)
    start = MetaStart(period.meta_rate) if period.start == "meta" else None
    place = execution["execution"].place if execution else None
    tenant = place.join(synthesizer.lasting) if place else None
    return Task(
        name, source, depth, mapping, weight, bank, synthesizer, epochs, start, feed, tenant
    )


def _real_images(
    config: RunConfig, source: Source, device: torch.device
) -> tuple[ImageBank | FileBank, Feed | None]:
    """Real training data of A (mode b), and who makes its batches.

    In memory and without DALI it is a bank like any other, read by the kernel.
    """
    loading, info = config.loading, source.info
    split = dataset(info.name).train(config.side)
    kept = held(split, loading, device)
    settings: dict[str, Any] = {
        "batch": config.storing.batch_real, "pad": augmentation(config.storing, info)[0],
        "device": device, "loading": loading,
    }  # fmt: skip
    if isinstance(kept, FileSplit):
        return FileBank(kept, loading), open_feed(kept, info, **settings)[0]
    bank = ImageBank(kept.images.shape[1], config.side, device, len(kept.images))
    bank.add(kept.images, kept.labels)
    if not uses_dali(loading, info, split):
        return bank, None
    return bank, open_feed(Split(bank.images, kept.labels), info, **settings)[0]


def _dali_replay(
    config: RunConfig, source: Source, bank: ImageBank, channels: int, device: torch.device
) -> Feed | None:
    """DALI in the kernel's stead for a bank of synthetic images, if the setting says so."""
    if config.storing.replay != "dali":
        return None
    dali.chosen("dali")
    info, period = source.info, config.storing
    return dali.DaliFeed(
        lambda rows: bank.images.index_select(0, rows.to(device)), side=config.side,
        channels=channels, batch=period.batch, pad=augmentation(period, info)[0],
        normaliser=(info.mean, info.std), device=device, prefetch=config.loading.prefetch,
    )  # fmt: skip


def _unique_names(sources: list[Source], taken: list[str]) -> list[str]:
    """A name a source, none of them twice and none of a provider among those ``taken``."""
    names: list[str] = []
    for source in sources:
        base, count = source.info.task, 2
        name = base
        while name in names or (names and name in taken):
            name, count = f"{base}-{count}", count + 1
        names.append(name)
    return names
