"""One synthesize period in upstream's order and at its cost (SPEC section 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.reference.banks import FeatureBank, quantise
from kiop_fast.reference.hooks import InstanceMeanHook, StatisticsHook
from kiop_fast.reference.losses import adversarial_loss, contrastive_loss
from kiop_fast.reference.networks import Generator, Head
from kiop_fast.reference.views import global_view, local_view, normalise
from kiop_fast.runtime import draws
from kiop_fast.source import Source, batchnorm_layers
from kiop_fast.synthesize import SynthesisDraws, Synthesised, generator_channels
from kiop_fast.synthesize.generator import load_weights
from kiop_fast.synthesize.losses import head_weights


class Synthesizer:
    """Makes images for one task; the projection head, its Adam and the feature bank persist.

    The teacher runs as a private copy whose weights take gradients that nobody uses, because
    upstream's does; the source itself stays frozen.  Arguments as
    :class:`kiop_fast.synthesize.Synthesizer`.
    """

    def __init__(
        self, teacher: Source, config: SynthesisConfig, normaliser: DatasetInfo, *, side: int,
        bank_rows: int, seed: int, task: str, device: torch.device,
    ) -> None:  # fmt: skip
        self.teacher, self.config, self.device = teacher, config, device
        self.normaliser = normaliser
        self.model = copy.deepcopy(teacher.model).requires_grad_(True)
        layers = batchnorm_layers(self.model).values()
        self.means = [InstanceMeanHook(layer) for layer in layers]
        self.statistics = [StatisticsHook(layer) for layer in layers]
        width = sum(layer.num_features for layer in layers)
        self.generator = Generator(
            config.latent, config.width, side, generator_channels(config, teacher)
        ).to(device)
        head: Any = Head(width, config.head_width, config.head_dim)
        load_weights(head, head_weights(draws.generator(seed, 0, task, "head"), head))
        self.head: Head = head.to(device)
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=config.lr)
        self.features = FeatureBank(bank_rows, width)

    def synthesize(
        self,
        drawn: SynthesisDraws,
        student: Callable[[Tensor], Tensor],
        mapping: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Synthesised:
        """One call: a generator step a row of the draws, at most ``config.steps`` of them.

        The images and features of the step with the lowest total loss are kept.

        Args:
            drawn: its random numbers.
            student: normalised images → A's unmapped logits through the prompt.
            mapping: A's class for each of the teacher's; None where A is the teacher.
            on_step: called with the number of finished steps and the total loss (a tensor).
        """
        config = self.config
        self.model.eval()
        load_weights(self.generator, drawn.weights)
        self.generator.train()
        z = drawn.z.to(next(self.generator.parameters()), copy=True).requires_grad_()
        targets = drawn.targets.to(self.device)
        groups: list[dict[str, Any]] = [
            {"params": list(self.generator.parameters())}, {"params": [z]},
        ]  # fmt: skip
        optimizer = torch.optim.Adam(groups, config.lr, (config.beta1, config.beta2))
        best, best_step, kept, losses = torch.inf, 0, None, []
        for step in range(min(drawn.steps, config.steps)):
            images = self.generator(z)
            terms, features = self._terms(images, drawn, step, targets, student, mapping)
            total = terms[-1]
            losses.append(torch.stack(terms).detach())
            if kept is None or best > total.item():
                best, best_step, kept = total.item(), step, (images.detach(), features)
            optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if config.cr:
                self.head_optimizer.step()
            if on_step is not None:
                on_step(step + 1, total.detach())
        assert kept is not None
        best_images, best_features = kept
        self.features.add(best_features)
        return Synthesised(
            quantise(best_images).to(self.device), drawn.targets, best_features,
            torch.stack(losses).cpu(), best_step,
        )  # fmt: skip

    def _terms(
        self, images: Tensor, drawn: SynthesisDraws, step: int, targets: Tensor,
        student: Callable[[Tensor], Tensor], mapping: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """Loss terms in the order of TERMS, and the batch's [local; global] features."""
        config, seen, norm = self.config, drawn.views, self.normaliser
        wide = global_view(images, seen.crop[step], seen.crop_flip[step], config.pad)
        wide = normalise(wide, norm.mean, norm.std)
        near = local_view(images, seen.box[step], seen.box_flip[step])
        near = normalise(near, norm.mean, norm.std)

        logits = self.model(wide)
        bn = torch.stack([hook.loss for hook in self.statistics]).sum()
        oh = F.cross_entropy(logits, targets)
        adv = cr = oh.new_zeros(())
        if config.adv:
            adv = adversarial_loss(student(wide), logits, mapping)

        global_ = torch.cat([hook.means for hook in self.means], dim=1)
        self.model(near)
        local = torch.cat([hook.means for hook in self.means], dim=1)
        if config.cr:
            rows = None if drawn.negatives is None else drawn.negatives[step]
            cached_local, cached_global = (part.to(local) for part in self.features.pairs(rows))
            cr = contrastive_loss(
                self.head, local, global_, cached_local, cached_global, config.cr_temperature
            )
        total = config.bn * bn + config.oh * oh + config.adv * adv + config.cr * cr
        return [bn, oh, adv, cr, total], torch.cat([local, global_], dim=1).detach()
