"""One synthesize period: a fresh generator learns a batch of images that carry a model's
knowledge (paper section 4.1 and eq. 4; SPEC section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.runtime import draws
from kiop_fast.runtime.execution import PLAIN, Execution
from kiop_fast.runtime.heap import kept_heap
from kiop_fast.runtime.linear import split_product
from kiop_fast.runtime.optimizers import adam, state_tensors
from kiop_fast.source import Source, batchnorm_layers
from kiop_fast.synthesize.banks import FeatureBank, quantise
from kiop_fast.synthesize.generator import Generator, generator_weights, load_weights
from kiop_fast.synthesize.losses import ProjectionHead, head_weights
from kiop_fast.synthesize.step import SynthesisStep


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

    @property
    def steps(self) -> int:
        """Generator steps of the call."""
        return len(self.views.crop)


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

    shape = (config.steps_of(epoch, call), config.batch)
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
        negatives=draws.negative_rows(rng("negatives"), shape[0], stored, config.negatives),
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
        execution: precision, graphs, compiled regions.
    """

    def __init__(
        self, teacher: Source, config: SynthesisConfig, normaliser: DatasetInfo, *, side: int,
        bank_rows: int, seed: int, task: str, device: torch.device,
        execution: Execution = PLAIN,
    ) -> None:  # fmt: skip
        features = sum(m.num_features for m in batchnorm_layers(teacher.model).values())
        channels = generator_channels(config, teacher)
        self.config = config
        self.generator = Generator(config.latent, config.width, side, channels).to(device)
        self.generator.to(memory_format=torch.channels_last)
        self.head = ProjectionHead(
            features, config.head_width, config.head_dim,
            split_product if execution.precision == "bf16x3" else None,
        )  # fmt: skip
        load_weights(self.head, head_weights(draws.generator(seed, 0, task, "head"), self.head))
        self.head.to(device)
        self.head_optimizer = adam(self.head.parameters(), config.lr)
        factors = execution.factors(self.head.first.weight.dtype)  # the head takes its rows so
        self.features = FeatureBank(bank_rows, features, device, factors, config.batch)
        self._step = SynthesisStep(
            teacher, config, normaliser, self.generator, self.head, self.head_optimizer,
            self.features, execution,
        )  # fmt: skip

    @property
    def lasting(self) -> list[Tensor]:
        """What a call takes over from the one before: head, its Adam and the feature bank."""
        adam = state_tensors(self.head_optimizer)
        return [*self.head.parameters(), *adam, self.features.buffer]

    @property
    def captures(self) -> int:
        """CUDA graphs made so far: one a student and size bucket of the feature bank."""
        return self._step.captures

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
            student: normalised images → A's unmapped logits through the prompt.  The same
                callable in a later call finds its captured graph again.
            mapping: A's class for each of the teacher's; None where A is the teacher.
            on_step: called with the number of finished steps and the total loss (a tensor).
        """
        step, steps = self._step, min(drawn.steps, self.config.steps)
        with kept_heap(step.device):
            advance = step.begin(drawn, student, mapping)
            for done in range(1, steps + 1):
                advance(done == steps)
                if on_step is not None:
                    on_step(done, step.losses[done - 1, -1])
        best = step.best
        self.features.add(best.features)
        # The host waits here alone; a step's number is exact in fp32.
        told = torch.cat([step.losses[:steps].flatten(), best.step.view(1)]).cpu()
        return Synthesised(
            quantise(best.images), drawn.targets, best.features.clone(),
            told[:-1].view(steps, -1), int(told[-1]),
        )  # fmt: skip
