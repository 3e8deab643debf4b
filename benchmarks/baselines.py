"""Two honest opponents of the fast engine.

``tuned``: the reference as a careful user would tune it without touching its mathematics: both
banks on the device instead of PNG files and host memory, TF32 products on a GPU.
``compile``: the restructured step (frozen teacher, both views in one batch, half the head's
backward, fused Adam) as one ``torch.compile(mode="reduce-overhead")`` region over the eager twins.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kiop_fast import reference
from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.engine import Engine
from kiop_fast.kernels import bank_replay_eager, mapped_kl
from kiop_fast.kernels.dispatch import VARIABLE
from kiop_fast.kernels.views import views_eager
from kiop_fast.prompt import PromptedModel
from kiop_fast.reference.synthesizing import Synthesizer as ReferenceSynthesizer
from kiop_fast.runtime import draws
from kiop_fast.source import BatchNormTaps, Source, batchnorm_layers
from kiop_fast.store import StoringDraws, Term
from kiop_fast.synthesize import (
    Generator,
    ProjectionHead,
    SynthesisDraws,
    Synthesised,
    generator_channels,
    quantise,
)
from kiop_fast.synthesize.generator import load_weights
from kiop_fast.synthesize.losses import adversarial_loss, contrastive_loss, head_weights

Losses = Callable[[Tensor], Any]


class DeviceImages:
    """All images of a task on the device."""

    def __init__(
        self, channels: int, side: int, device: torch.device, folder: Any = None, capacity: int = 0
    ) -> None:
        self.images = torch.empty(0, channels, side, side, dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, images: Tensor, targets: Tensor) -> None:
        self.images = torch.cat([self.images, images.to(self.images.device)])


class DeviceFeatures:
    """A ring of feature pairs on the device."""

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, 2 * width, device=device)
        self.added = 0

    @property
    def stored(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, features: Tensor) -> None:
        position = (self.added + torch.arange(len(features))) % len(self.rows)
        self.rows[position.to(self.rows.device)] = features.to(self.rows)
        self.added += len(features)

    def pairs(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        chosen = (
            self.rows[: self.stored] if index is None else self.rows[index.to(self.rows.device)]
        )
        local, global_ = chosen.chunk(2, dim=1)
        return local, global_


def replayed(term: Term, drawn: StoringDraws, step: int, replay: Callable[..., Tensor]) -> Tensor:
    """A storing batch out of a device bank, crops and flips as drawn, normalised."""
    images, info = term.bank.images, term.source.info
    like: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    on_device = [
        None if table is None else table[step].to(images.device, non_blocking=True)
        for table in (drawn.index, drawn.crop, drawn.flip)
    ]
    index, crop, flip = on_device
    return replay(
        images, index, crop=crop, flip=flip, pad=drawn.pad,
        mean=torch.tensor(info.mean, **like), std=torch.tensor(info.std, **like),
    )  # fmt: skip


def storing_with(replay: Callable[..., Tensor]) -> Callable[..., Any]:
    """The storing periods of a run, which read device banks through ``replay``."""

    class Storing:
        def __init__(
            self, terms: Sequence[Term], optimizer: torch.optim.Optimizer, steps: int
        ) -> None:
            self.terms, self.optimizer, self.steps = terms, optimizer, steps

        def run(self, drawn: Mapping[str, StoringDraws], on_step: Any = None) -> Tensor:
            return torch.stack([self._step(drawn, step) for step in range(self.steps)]).cpu()

        def _step(self, drawn: Mapping[str, StoringDraws], step: int) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            results = [
                term.loss(replayed(term, drawn[term.name], step, replay)) for term in self.terms
            ]
            weighted = [term.weight * r.loss for term, r in zip(self.terms, results, strict=True)]
            self.optimizer.zero_grad()
            torch.stack(weighted).sum().backward()
            self.optimizer.step()
            rows = [drawn[term.name].index.shape[1] for term in self.terms]
            shares = [r.agreement / n for r, n in zip(results, rows, strict=True)]
            return torch.stack([*(r.loss.detach() for r in results), *shares])

    return Storing


class TunedSynthesizer(ReferenceSynthesizer):
    """The reference with its feature bank on the device."""

    def __init__(self, *args: Any, bank_rows: int, device: torch.device, **more: Any) -> None:
        super().__init__(*args, bank_rows=1, device=device, **more)
        self.features = DeviceFeatures(bank_rows, self.features.rows.shape[1] // 2, device)  # type: ignore[assignment]


@contextmanager
def twins() -> Iterator[None]:
    """Inside, operations run (and are traced) as their eager twins."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "torch"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile(reduce-overhead), its operations as their twins."""
    made = torch.compile(function, mode="reduce-overhead")

    def call(*args: Any) -> Any:
        with twins():
            return made(*args)

    return call


class StaticPromptedModel(PromptedModel):
    """A through the prompt with its BatchNorm layers switched once, on a copy, not at every call.

    Policy ``batch`` alone: what training uses.
    """

    def __init__(self, target: Source, *args: Any, **more: Any) -> None:
        super().__init__(target, *args, **more)
        self.model = copy.deepcopy(target.model)
        for layer in batchnorm_layers(self.model).values():
            layer.training, layer.track_running_stats = True, False

    def logits(self, images: Tensor) -> Tensor:
        seen: Tensor = self.model(self.seen(images))
        return seen

    def plain_logits(self, images: Tensor) -> Tensor:
        plain: Tensor = self.model(images)
        return plain


def compiled_core_loss(prompted: Any, temperature: float, target_side: str) -> Losses:
    """A's term, target_of_a = "prompted", one compiled region."""
    assert target_side == "prompted"

    def loss(images: Tensor) -> Any:
        with torch.no_grad():
            plain = prompted.plain_logits(images)
        return mapped_kl(plain, prompted.logits(images), None, temperature)

    return compiled(loss)


def compiled_provider_loss(
    prompted: Any, provider: Source, temperature: float, target_side: str
) -> Losses:
    """A provider's term, target_of_b = "provider", one compiled region."""
    assert target_side == "provider"

    def loss(images: Tensor) -> Any:
        with torch.no_grad():
            theirs = provider.model(images)
        return mapped_kl(prompted.logits(images), theirs, prompted.mapping, temperature)

    return compiled(loss)


class CompiledSynthesizer:
    """Restructured synthesis; loss and gradients of a step are one compiled region."""

    def __init__(
        self, teacher: Source, config: SynthesisConfig, normaliser: DatasetInfo, *, side: int,
        bank_rows: int, seed: int, task: str, device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.device = config, device
        self.normaliser = [
            torch.tensor(x, device=device) for x in (normaliser.mean, normaliser.std)
        ]
        self.teacher = copy.deepcopy(teacher.model)
        self.taps = BatchNormTaps(self.teacher, rows=config.batch)
        self.taps.__enter__()  # for good, on the copy: the traced code never changes
        width = sum(layer.num_features for layer in batchnorm_layers(teacher.model).values())
        channels = generator_channels(config, teacher)
        self.generator = Generator(config.latent, config.width, side, channels).to(device)
        self.generator.to(memory_format=torch.channels_last)
        self.head = ProjectionHead(width, config.head_width, config.head_dim)
        load_weights(self.head, head_weights(draws.generator(seed, 0, task, "head"), self.head))
        self.head.to(device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), config.lr, fused=True)
        self.features = DeviceFeatures(bank_rows, width, device)
        self._steps: dict[int, Callable[..., Any]] = {}

    def _step(self, student: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        """The compiled loss of a step: terms (5,), images and [local; global] features."""
        config, (mean, std) = self.config, self.normaliser

        def losses(
            z: Tensor, targets: Tensor, crop: Tensor, crop_flip: Tensor, box: Tensor,
            box_flip: Tensor, mapping: Tensor | None, cached: tuple[Tensor, Tensor],
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            images = self.generator(z)
            both = views_eager(
                images, crop, crop_flip, box, box_flip, pad=config.pad, mean=mean, std=std
            )
            logits = self.teacher(both)[: config.batch]
            bn, features = self.taps.take()
            global_, local = features.split(config.batch)
            oh = F.cross_entropy(logits, targets)
            adv = adversarial_loss(student(both[: config.batch]), logits, mapping)
            cr = contrastive_loss(self.head, local, global_, *cached, config.cr_temperature)
            total = config.bn * bn + config.oh * oh + config.adv * adv + config.cr * cr
            seen = torch.cat([local, global_], dim=1).detach()
            return torch.stack([bn, oh, adv, cr, total]), images, seen

        return compiled(losses)

    def synthesize(
        self, drawn: SynthesisDraws, student: Callable[[Tensor], Tensor], mapping: Tensor | None,
        on_step: Any = None,
    ) -> Synthesised:  # fmt: skip
        config, seen = self.config, drawn.views
        owner = id(getattr(student, "__self__", student))
        step_losses = self._steps.setdefault(owner, self._step(student))
        load_weights(self.generator, drawn.weights)
        self.generator.train()
        z = drawn.z.to(self.device, copy=True).requires_grad_()
        optimizer = torch.optim.Adam(
            [*self.generator.parameters(), z], config.lr, (config.beta1, config.beta2), fused=True
        )
        targets = drawn.targets.to(self.device)
        tables = [t.to(self.device) for t in (seen.crop, seen.crop_flip, seen.box, seen.box_flip)]
        best = torch.full((), torch.inf, device=self.device)
        kept: tuple[Tensor, Tensor] | None = None
        log = []
        best_step = torch.zeros((), dtype=torch.int64, device=self.device)
        for step in range(config.steps):
            torch.compiler.cudagraph_mark_step_begin()
            rows = None if drawn.negatives is None else drawn.negatives[step]
            cached = self.features.pairs(rows)
            terms, images, features = step_losses(
                z, targets, *(table[step] for table in tables), mapping, cached
            )
            optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            terms[-1].backward()
            optimizer.step()
            self.head_optimizer.step()
            log.append(terms.detach().clone())
            take = (log[-1][-1] < best) | (kept is None)
            best = torch.where(take, log[-1][-1], best)
            best_step = torch.where(take, step, best_step)
            old = kept or (images.detach().clone(), features.clone())
            kept = (torch.where(take, images.detach(), old[0]), torch.where(take, features, old[1]))
        assert kept is not None
        self.features.add(kept[1])
        return Synthesised(
            quantise(kept[0]), drawn.targets, kept[1], torch.stack(log).cpu(), int(best_step)
        )


def one_period(storing: Callable[..., Any]) -> Callable[..., Tensor]:
    """``store`` of an engine from its ``storing``."""

    def store(terms: Any, drawn: Any, optimizer: Any, steps: int, on_step: Any = None) -> Tensor:
        log: Tensor = storing(terms, optimizer, steps).run(drawn, on_step)
        return log

    return store


def tuned() -> Engine:
    """The reference with banks on the device; its TF32 is switched on around a run."""
    storing = storing_with(bank_replay_eager)
    return Engine(
        "tuned", DeviceImages, TunedSynthesizer, reference.ReferencePromptedModel,
        reference.core_loss, reference.provider_loss, reference.vanilla_loss, one_period(storing),
        storing,
    )  # fmt: skip


def compile_() -> Engine:
    """The restructured code under torch.compile(reduce-overhead)."""
    storing = storing_with(compiled_replay())
    return Engine(
        "compile", DeviceImages, CompiledSynthesizer, StaticPromptedModel, compiled_core_loss,
        compiled_provider_loss, reference.vanilla_loss, one_period(storing), storing,
    )  # fmt: skip


def compiled_replay() -> Callable[..., Tensor]:
    """bank_replay's twin, compiled; its result is copied, for the next step reuses the memory."""
    made = torch.compile(bank_replay_eager)
    return lambda *args, **options: made(*args, **options).clone()
