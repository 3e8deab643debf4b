"""``compile``: the restructured step as one ``torch.compile(mode="reduce-overhead")`` region.

Frozen teacher, both views in one batch, half the head's backward, fused Adam, over the eager twins.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from baselines import DeviceFeatures, DeviceImages, one_period, storing_with
from torch import Tensor

from kiop_fast import reference
from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.engine import Engine
from kiop_fast.kernels import bank_replay_eager, mapped_kl
from kiop_fast.kernels.dispatch import VARIABLE
from kiop_fast.kernels.views import views_eager
from kiop_fast.prompt import PromptedModel
from kiop_fast.runtime import draws
from kiop_fast.source import BatchNormTaps, Source, batchnorm_layers
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
            rows = [torch.cat([local.detach(), part]) for part in cached]  # with room for a batch
            cr = contrastive_loss(self.head, local, global_, *rows, config.cr_temperature)
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
