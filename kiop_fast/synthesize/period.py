"""One synthesize period: a fresh generator learns a batch of images that carry a model's
knowledge (paper section 4.1 and eq. 4; SPEC section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.kernels import views
from kiop_fast.runtime import draws
from kiop_fast.source import BatchNormTaps, Source, batchnorm_layers
from kiop_fast.synthesize.banks import FeatureBank, quantise
from kiop_fast.synthesize.generator import Generator, generator_weights, load_weights
from kiop_fast.synthesize.losses import (
    TERMS,
    ProjectionHead,
    adversarial_loss,
    contrastive_loss,
    head_weights,
)


@dataclass(frozen=True)
class SynthesisDraws:
    """All random numbers of one call, drawn before it starts.

    Attributes:
        weights: the generator's, by parameter name.
        z: (N, latent).
        targets: (N,) int64, sorted.
        views: crops, boxes and flips of every step.
        negatives: (steps, n) feature-bank rows, or None for all stored rows.
    """

    weights: dict[str, Tensor]
    z: Tensor
    targets: Tensor
    views: draws.ViewDraws
    negatives: Tensor | None


@dataclass(frozen=True)
class Synthesised:
    """What one call leaves behind.

    Attributes:
        images: (N, C, s, s) uint8, of the step with the lowest total loss.
        targets: (N,) int64, the classes they were made for.
        features: (N, 2F) rows [local; global] of that step.
        losses: (steps, len(TERMS)) of every step.
        best_step: index of that step.
    """

    images: Tensor
    targets: Tensor
    features: Tensor
    losses: Tensor
    best_step: int


def draw_synthesis(
    config: SynthesisConfig, teacher: Source, side: int, *, seed: int, epoch: int, task: str,
    call: int, stored: int,
) -> SynthesisDraws:  # fmt: skip
    """Draw everything one call needs, from ``(seed, epoch, task, purpose)``."""

    def rng(purpose: str):  # type: ignore[no-untyped-def]
        return draws.generator(seed, epoch, task, f"{purpose}/{call}")

    shape = (config.steps, config.batch)
    boxes, crops = rng("local view"), rng("global view")
    generator = Generator(config.latent, config.width, side, generator_channels(config, teacher))
    return SynthesisDraws(
        weights=generator_weights(rng("generator"), generator),
        z=draws.normal(rng("latent"), config.batch, config.latent),
        targets=draws.sorted_targets(
            rng("targets"), config.batch, teacher.classes, balanced=config.balanced
        ),
        views=draws.ViewDraws(
            crop=draws.crop_offsets(crops, shape, config.pad),
            crop_flip=draws.flips(crops, shape, config.flip),
            box=draws.resized_crop_boxes(boxes, shape, side, config.scale, config.ratio),
            box_flip=draws.flips(boxes, shape, config.flip),
        ),
        negatives=draws.negative_rows(rng("negatives"), config.steps, stored, config.negatives),
    )


def generator_channels(config: SynthesisConfig, teacher: Source) -> int:
    """One channel for a teacher of grey data unless ``config.grey`` is off, else three."""
    return 1 if config.grey and teacher.info.channels == 1 else 3


class Synthesizer:
    """Makes images for one task; the projection head, its Adam and the feature bank persist.

    Args:
        teacher: whose knowledge the images carry.
        config: settings of the period.
        normaliser: the statistics that normalise the images on every path of this task.
        side: image side, pixels.
        bank_rows: capacity of the feature bank, min(config.bank_rows, all rows of the run).
        seed, task: name of the draw of the head's first weights.
    """

    def __init__(
        self, teacher: Source, config: SynthesisConfig, normaliser: DatasetInfo, *, side: int,
        bank_rows: int, seed: int, task: str, device: torch.device,
    ) -> None:  # fmt: skip
        self.teacher, self.config, self.device = teacher, config, device
        self.mean = torch.tensor(normaliser.mean, device=device)
        self.std = torch.tensor(normaliser.std, device=device)
        features = sum(m.num_features for m in batchnorm_layers(teacher.model).values())
        self.generator = Generator(
            config.latent, config.width, side, generator_channels(config, teacher)
        ).to(device)
        self.generator.to(memory_format=torch.channels_last)
        self.head = ProjectionHead(features, config.head_width, config.head_dim)
        load_weights(self.head, head_weights(draws.generator(seed, 0, task, "head"), self.head))
        self.head.to(device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=config.lr)
        self.features = FeatureBank(bank_rows, features, device)

    def synthesize(
        self,
        drawn: SynthesisDraws,
        student: Callable[[Tensor], Tensor],
        mapping: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Synthesised:
        """One call: ``config.steps`` generator steps, the best step's images and features kept.

        Args:
            drawn: its random numbers.
            student: normalised images → A's unmapped logits through the prompt.
            mapping: A's class for each of the teacher's; None where A is the teacher.
            on_step: called with the number of finished steps and the total loss (a tensor).
        """
        config = self.config
        load_weights(self.generator, drawn.weights)
        self.generator.train()
        z = drawn.z.to(self.mean, copy=True).requires_grad_()
        targets = drawn.targets.to(self.device)
        optimizer = torch.optim.Adam(
            [*self.generator.parameters(), z], lr=config.lr, betas=(config.beta1, config.beta2)
        )
        best = torch.full((), torch.inf, device=self.device)
        best_step = torch.zeros((), dtype=torch.int64, device=self.device)
        best_images = best_features = torch.empty(0)
        losses = torch.empty(config.steps, len(TERMS), device=self.device)
        taps = BatchNormTaps(self.teacher.model, rows=config.batch)
        for step in range(config.steps):
            images = self.generator(z)
            terms, features = self._terms(images, drawn, step, targets, student, mapping, taps)
            total = terms[-1]
            losses[step] = torch.stack(terms).detach()
            if step == 0:
                best_images = torch.empty_like(images)
                best_features = torch.empty_like(features)
            take = (total < best) | torch.tensor(step == 0, device=self.device)
            best = torch.where(take, total, best).detach()
            best_step = torch.where(take, step, best_step)
            best_images = torch.where(take, images, best_images).detach()
            best_features = torch.where(take, features, best_features)
            optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if config.cr:
                self.head_optimizer.step()
            if on_step is not None:
                on_step(step + 1, total.detach())
        self.features.add(best_features)
        return Synthesised(
            quantise(best_images), drawn.targets, best_features, losses.cpu(), int(best_step)
        )

    def _terms(
        self, images: Tensor, drawn: SynthesisDraws, step: int, targets: Tensor,
        student: Callable[[Tensor], Tensor], mapping: Tensor | None, taps: BatchNormTaps,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """Loss terms in the order of TERMS, and the batch's [local; global] features."""
        config, seen = self.config, drawn.views
        both = views(
            images, seen.crop[step], seen.crop_flip[step], seen.box[step], seen.box_flip[step],
            pad=config.pad, mean=self.mean, std=self.std,
        )  # fmt: skip
        batch = len(images)
        with taps:  # off again before the student runs: A may be teacher and student
            logits = self.teacher.model(both)[:batch]
            bn, features = taps.take()
        global_, local = features.split(batch)
        oh = F.cross_entropy(logits, targets)
        adv = cr = torch.zeros((), device=self.device)
        if config.adv:
            adv = adversarial_loss(student(both[:batch]), logits, mapping)
        if config.cr:
            rows = None if drawn.negatives is None else drawn.negatives[step].to(self.device)
            cached_local, cached_global = self.features.pairs(rows)
            cr = contrastive_loss(
                self.head, local, global_, cached_local, cached_global, config.cr_temperature
            )
        total = config.bn * bn + config.oh * oh + config.adv * adv + config.cr * cr
        return [bn, oh, adv, cr, total], torch.cat([local, global_], dim=1).detach()
