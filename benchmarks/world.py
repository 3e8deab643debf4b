"""One engine's copy of a problem: models, prompt, banks and draws, the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sizes import Problem
from torch import Tensor

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.engine import Engine
from kiop_fast.prompt import Prompt, PromptedModel, calibrate, random_mapping
from kiop_fast.runtime import draws
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.offload import SharedPlace
from kiop_fast.runtime.optimizers import sgd
from kiop_fast.runtime.profile import Counter
from kiop_fast.runtime.static_step import Scratch
from kiop_fast.source import Source, batchnorm_layers, freeze
from kiop_fast.source.zoo import build
from kiop_fast.store import Term, draw_storing
from kiop_fast.synthesize import (
    SynthesisDraws,
    Synthesised,
    draw_synthesis,
    generator_channels,
)

SEED = 0
MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.3, 0.2)


def make_source(arch: str, classes: int, side: int, seed: int) -> Source:
    """An untrained model whose BatchNorm layers have seen noise, so that none is the identity."""
    model = build(arch, classes, side, seed=seed)
    noise = draws.normal(draws.generator(seed, 0, arch, "benchmark"), 32, 3, side, side)
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(noise)
    name = f"random{seed}"
    labels = tuple(map(str, range(classes)))
    info = DatasetInfo(name, side, 3, labels, mean=MEAN, std=STD)
    return freeze(model, info, name=f"{arch}@{name}", arch=arch)


@lru_cache(maxsize=4)
def smooth_images(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: blurred noise, which compresses about as pictures do."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, max(side // 4, 2), max(side // 4, 2), generator=generator)
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear")
    return (fine * 255).to(torch.uint8)


def feature_rows(count: int, width: int) -> Tensor:
    """(count, 2 · width) standard normal rows of a feature bank."""
    return torch.randn(count, 2 * width, generator=torch.Generator().manual_seed(width))


class _Enough(Exception):
    """Raised after the last step that is wanted."""


class Job:
    """One task of a world.

    Attributes:
        system: the engine's synthesizer, its bank holding ``problem.cached`` rows.
        student: normalised images → A's unmapped logits through the prompt.
        tenant: what the synthesizer keeps from call to call, where tasks share a place for it.
    """

    def __init__(
        self, name: str, source: Source, depth: int, mapping: Tensor | None, world: World,
        folder: Path,
    ) -> None:  # fmt: skip
        problem, config = world.problem, world.problem.config
        self.name, self.source, self.depth, self.mapping = name, source, depth, mapping
        features = sum(layer.num_features for layer in batchnorm_layers(source.model).values())
        synthesis, more = config.synthesis, int(world.spares_last)  # for `stepping`
        self.system = world.engine.synthesizer(
            source, replace(synthesis, steps=synthesis.steps + more), source.info, side=config.side,
            bank_rows=problem.cached + 8 * config.synthesis.batch, seed=SEED, task=name,
            device=world.device, **world.execution,
        )  # fmt: skip
        if problem.cached:
            self.system.features.add(feature_rows(problem.cached, features).to(world.device))
        self.tenant = world.place.join(self.system.lasting) if world.place else None
        channels = generator_channels(config.synthesis, source)
        self.bank = world.engine.image_bank(
            channels, config.side, world.device, folder / name, capacity=problem.bank + 1024
        )
        images = smooth_images(problem.bank, config.side).to(world.device)
        self.bank.add(images, torch.zeros(problem.bank, dtype=torch.int64))
        self.prompted = world.engine.prompted(
            world.target, world.prompt, depth, mapping, batchnorm=config.prompt.batchnorm
        )
        if mapping is None:
            self.loss = world.engine.core_loss(
                self.prompted, config.storing.temperature, config.storing.target_of_a
            )
        else:
            self.loss = world.engine.provider_loss(
                self.prompted, source, config.storing.temperature, config.storing.target_of_b
            )

    def enter(self) -> None:
        """As :meth:`kiop_fast.tasks.Task.enter`."""
        if self.tenant is not None:
            self.tenant.enter()


class World:
    """A target and its providers, random but fixed, as one engine runs them.

    Args:
        problem: what is run.
        engine: who runs it.
        device: where.
        folder: scratch, for image banks made of files.
        precision: of the fast engine, which alone has that setting.
        jobs: names of the tasks to prepare, ``A``, ``B``, ``B2`` …; all by default.
        offload: the fast engine's setting of that name.
    """

    def __init__(
        self, problem: Problem, engine: Engine, device: torch.device, folder: Path,
        jobs: tuple[str, ...] | None = None, precision: str = "fp32", offload: bool = False,
    ) -> None:  # fmt: skip
        self.problem, self.engine, self.device = problem, engine, device
        config, side = problem.config, problem.config.side
        fast = engine.name == "fast"
        execution = Execution(precision, scratch=Scratch(device, frugal=offload))  # as a run's
        self.place = SharedPlace(device) if offload and fast else None
        self.execution = {"execution": execution} if fast else {}
        self.spares_last = fast and device.type == "cpu"
        self.target, *providers = (
            make_source(problem.arch, classes, side, seed)
            for seed, classes in enumerate(problem.classes)
        )
        for source in (self.target, *providers):
            source.model.to(device)
            if engine.name in ("fast", "compile"):  # as kiop_fast.run.Run does
                source.model.to(memory_format=torch.channels_last)
        self.prompt = Prompt(side, config.prompt.rings).to(device)
        self.jobs: dict[str, Job] = {}
        tasks: list[tuple[str, Source, Tensor | None]] = [("A", self.target, None)]
        for k, provider in enumerate(providers):
            name = f"B{k + 1}" if k else "B"
            rng = draws.generator(SEED, 0, name, "mapping")
            mapping = random_mapping(rng, self.target.classes, provider.classes)
            tasks.append((name, provider, mapping.to(device)))
        for k, (name, source, mapping) in enumerate(tasks):
            if jobs is None or name in jobs:
                self.jobs[name] = Job(name, source, k + 1, mapping, self, folder)
        storing = config.storing
        self.optimizer = sgd(
            self.prompt.parameters(), storing.lr, storing.momentum, storing.weight_decay
        )
        self.drawn = {
            name: draw_storing(
                config.storing, job.source.info, problem.bank, config.storing.batch, seed=SEED,
                epoch=0, task=name,
            )
            for name, job in self.jobs.items()
        }  # fmt: skip
        self.terms = [
            Term(name, 1.0, job.bank, job.source, False, job.loss)
            for name, job in self.jobs.items()
        ]
        self.storing = engine.storing(self.terms, self.optimizer, storing.steps, **self.execution)

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        self.prompt.requires_grad_(False)
        yield
        self.prompt.requires_grad_(True)

    def rewind(self, name: str) -> None:
        """The task's feature bank holds ``problem.cached`` rows again."""
        self.jobs[name].system.features.added = self.problem.cached

    def _drawn(self, name: str, epoch: int) -> SynthesisDraws:
        job, config = self.jobs[name], self.problem.config
        return draw_synthesis(
            config.synthesis, job.source, config.side, seed=SEED, epoch=epoch, task=name, call=0,
            stored=job.system.features.stored,
        )  # fmt: skip

    def synthesizing(self, name: str, epoch: int = 0) -> Callable[[], Synthesised]:
        """One synthesize call of a task, its draws already made."""
        job, drawn = self.jobs[name], self._drawn(name, epoch)

        def call() -> Synthesised:
            job.enter()
            with self._fixed():
                result: Synthesised = job.system.synthesize(drawn, job.prompted.logits, job.mapping)
            return result

        return call

    def stepping(self, name: str) -> Callable[[], object]:
        """As many steps as a synthesize call of a task has, none of them a call's last.

        In a call's last step the fast engine on a CPU moves neither generator nor latent: one step
        in 200 of the paper's, but of two every other one.  So a longer call is broken off, before
        its end would put features and images away (milliseconds, which other engines pay).
        """
        if not self.spares_last:
            return self.synthesizing(name)
        job, steps = self.jobs[name], self.problem.config.synthesis.steps
        drawn = self._drawn(name, 0)
        tables = {field: torch.cat([t, t[:1]]) for field, t in vars(drawn.views).items()}
        sampled = drawn.negatives
        longer = replace(
            drawn, views=draws.ViewDraws(**tables),
            negatives=None if sampled is None else torch.cat([sampled, sampled[:1]]),
        )  # fmt: skip

        def enough(done: int, _: Tensor) -> None:
            if done == steps:
                raise _Enough

        def call() -> None:
            job.enter()
            with self._fixed(), suppress(_Enough):
                job.system.synthesize(longer, job.prompted.logits, job.mapping, enough)

        return call

    def store(self) -> Tensor:
        """One storing period over the banks as they were filled; (steps, 2 · tasks)."""
        log: Tensor = self.storing.run(self.drawn)
        return log

    def epoch(self, number: int) -> dict[str, Any]:
        """Synthesize for every task, fill the banks, store, evaluate; everything drawn inside."""
        losses = {}
        for name, job in self.jobs.items():
            result = self.synthesizing(name, number)()
            job.bank.add(result.images, result.targets)
            losses[name] = result.losses
        self.drawn = {
            name: draw_storing(
                self.problem.config.storing, job.source.info, len(job.bank),
                self.problem.config.storing.batch, seed=SEED, epoch=number, task=name,
            )
            for name, job in self.jobs.items()
        }  # fmt: skip
        losses["storing"] = self.store()
        return {"losses": losses, "accuracy": self.evaluate()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Calibrate on the bank, classify 1,024 images: the evaluation of a run, same for all."""
        found = {}
        tests = smooth_images(1024, self.problem.config.side).to(self.device) / 255
        for name, job in self.jobs.items():
            seen = PromptedModel(self.target, self.prompt, job.depth, job.mapping)
            bank = job.source.normalise(job.bank.images[:1024].to(self.device) / 255)
            statistics = calibrate(seen, bank, 256)
            worn = self.target.with_statistics(statistics)
            served = PromptedModel(worn, self.prompt, job.depth, job.mapping, batchnorm="running")
            said = [served(job.source.normalise(part)).argmax(1) for part in tests.split(256)]
            found[name] = float((torch.cat(said) == 0).double().mean())
        return found


def flop_of(call: Callable[[], Any]) -> float:
    """Floating-point operations of the products and convolutions that a call dispatches."""
    with Counter() as counter:
        call()
    return float(sum(counter.flops.values()))
