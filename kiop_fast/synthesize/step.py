"""One step of a synthesize period over tensors that stay where they are (SPEC section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.kernels import views
from kiop_fast.runtime import optimizers
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.profile import stage
from kiop_fast.runtime.static_step import Scratch, StaticStep, hold, row_of
from kiop_fast.source import BatchNormTaps, Source
from kiop_fast.synthesize.banks import FeatureBank
from kiop_fast.synthesize.generator import Generator, load_weights
from kiop_fast.synthesize.losses import (
    TERMS,
    ProjectionHead,
    adversarial_loss,
    contrastive_loss,
)

if TYPE_CHECKING:
    from kiop_fast.synthesize.period import SynthesisDraws

Student = Callable[[Tensor], Tensor]


class Best:
    """The step with the lowest total loss so far: its number, images and features."""

    def __init__(self, images: Tensor, features: Tensor) -> None:
        self.images, self.features = torch.zeros_like(images), torch.zeros_like(features)
        self.loss = images.new_full((), torch.inf)
        self.step = torch.zeros((), dtype=torch.int64, device=images.device)

    def tensors(self) -> list[Tensor]:
        return [self.images, self.features, self.loss, self.step]

    @torch.no_grad()
    def offer(self, at: Tensor, loss: Tensor, images: Tensor, features: Tensor) -> None:
        """Keep step ``at`` if its loss is the lowest; NaN replaces nothing but the first."""
        take = (loss < self.loss) | (at == 0)
        for kept, new in zip(self.tensors(), (images, features, loss, at), strict=True):
            torch.where(take, new, kept, out=kept)


class SynthesisStep:
    """Generator, latent, head and bank of one task, and the step that moves them.

    Args:
        generator, head, head_optimizer, features: moved in place, never replaced.
        others: as :class:`kiop_fast.synthesize.Synthesizer`.

    Attributes:
        losses: (steps, len(TERMS)) of the current call.
        best: its best step.
    """

    def __init__(
        self, teacher: Source, config: SynthesisConfig, normaliser: DatasetInfo,
        generator: Generator, head: ProjectionHead, head_optimizer: torch.optim.Adam,
        features: FeatureBank, execution: Execution,
    ) -> None:  # fmt: skip
        self.teacher, self.config, self.execution = teacher, config, execution
        self.generator, self.head, self.features = generator, head, features
        self.head_optimizer = head_optimizer
        like = next(generator.parameters())
        self.device = like.device
        self.mean, self.std = like.new_tensor(normaliser.mean), like.new_tensor(normaliser.std)
        self._generate: Any = generator
        self._embed: Any = head
        if execution.compile:
            self._generate = torch.compile(generator)
            self._embed = torch.compile(head, dynamic=True)  # its rows grow with the bank

        images, steps, side = config.batch, config.steps, 4 * generator.seed_side
        self.z = like.new_zeros(images, config.latent).requires_grad_()
        self._learned = [*generator.parameters(), self.z]
        self._head_learned = list(head.parameters()) if config.cr else []
        self.optimizer = optimizers.adam(self._learned, config.lr, (config.beta1, config.beta2))
        self.targets = torch.zeros(images, dtype=torch.int64, device=self.device)
        self.losses = like.new_zeros(steps, len(TERMS))
        self.at = torch.zeros((), dtype=torch.int64, device=self.device)
        width = features.rows.shape[1]
        self.best = Best(
            like.new_empty(images, generator.channels, side, side), like.new_empty(images, width)
        )
        self._tables: dict[str, Tensor] = {}
        self._runs: dict[_Call, StaticStep] = {}
        self._scratch = execution.scratch or Scratch(self.device)
        self._taps = BatchNormTaps(teacher.model, rows=images)

    @property
    def captures(self) -> int:
        """CUDA graphs made so far."""
        return sum(run.captures for run in self._runs.values())

    def begin(
        self, drawn: SynthesisDraws, student: Student, mapping: Tensor | None
    ) -> Callable[[bool], None]:
        """Set everything to the start of a call.

        Returns:
            What does a step, told whether it is the last one: generator and latent, where nobody
            needs them any more, then stay where they are (in a captured graph they do not).
        """
        load_weights(self.generator, drawn.weights)
        self.generator.train()
        with torch.no_grad():
            self.z.copy_(drawn.z)
        self.targets.copy_(drawn.targets)
        self.at.zero_()
        optimizers.restart(self.optimizer)
        seen = drawn.views
        hold(
            self._tables, self.device, crop=seen.crop, crop_flip=seen.crop_flip, box=seen.box,
            box_flip=seen.box_flip, negatives=drawn.negatives, mapping=mapping,
        )  # fmt: skip
        graphs = self.execution.graphs and self.device.type == "cuda"
        window, sampled = self.features.window(padded=graphs), drawn.negatives is not None
        places = tuple(table.data_ptr() for table in self._tables.values())
        call = _Call(student, 0 if sampled else window, sampled, places)
        if call not in self._runs:
            self._runs[call] = StaticStep(
                partial(self._move, call), self._state, self.device, self.execution.graphs,
                self._scratch,
            )  # fmt: skip
        run = self._runs[call]

        def advance(last: bool) -> None:
            if last and not run.graphed and self.config.start == "fresh":
                self._move(call, last=True)
            else:
                run()

        return advance

    def _state(self) -> list[Tensor]:
        learned = [*self._learned, *self._head_learned]
        moments = [
            *optimizers.state_tensors(self.optimizer),
            *optimizers.state_tensors(self.head_optimizer),
        ]
        buffers = list(self.generator.buffers())
        return [*learned, *moments, *buffers, *self.best.tensors(), self.at]

    def _row(self, name: str) -> Tensor:
        """This step's row of a table."""
        return row_of(self._tables[name], self.at)

    def _move(self, call: _Call, last: bool = False) -> None:
        """Losses, best step so far, gradients, optimisers."""
        with self.execution.products(self.device, search=True):
            self._moved(call, last)

    def _moved(self, call: _Call, last: bool) -> None:
        with self.execution.autocast(self.device):
            with stage("generator"):
                images = self._generate(self.z)
            terms, features = self._terms(images, call)
        total = terms[-1]
        with torch.no_grad():
            self.losses.index_copy_(0, self.at.view(1), torch.stack(terms)[None])
            self.best.offer(self.at, total, images, features)
            self.at.add_(1)
        learned = [*([] if last else self._learned), *self._head_learned]
        with stage("backward"):
            optimizers.set_gradients(total, learned)
        with stage("optimisers"):
            if not last:
                optimizers.step(self.optimizer)
            if self._head_learned:
                optimizers.step(self.head_optimizer)

    def _terms(self, images: Tensor, call: _Call) -> tuple[list[Tensor], Tensor]:
        """Loss terms in the order of TERMS, and the batch's [local; global] features."""
        config, batch = self.config, len(images)
        with stage("views"):
            both = views(
                images, self._row("crop"), self._row("crop_flip"), self._row("box"),
                self._row("box_flip"), pad=config.pad, mean=self.mean, std=self.std,
                channels_last=True,
            )  # fmt: skip
        with stage("teacher"), self._taps as taps:  # off again before the student runs: A may
            logits = self.teacher.logits(both)[:batch]  # be teacher and student
            bn, features = taps.take()
        global_, local = features.split(batch)
        oh = F.cross_entropy(logits, self.targets)
        adv = cr = self.mean.new_zeros(())
        if config.cr:
            with stage("contrastive"):
                rows = self.features.beside(self._row("negatives") if call.sampled else call.cached)
                weights = self.head.weights(self.features.rows.dtype)
                cr = contrastive_loss(
                    partial(self._embed, weights=weights), local, global_, *rows,
                    config.cr_temperature, None if call.sampled else self.features.count,
                )  # fmt: skip
        if config.adv:  # last: its backward pass comes first and frees what is largest
            with stage("student"):
                mapping = self._tables.get("mapping")
                adv = adversarial_loss(call.student(both[:batch]), logits, mapping)
        total = config.bn * bn + config.oh * oh + config.adv * adv + config.cr * cr
        return [bn, oh, adv, cr, total], torch.cat([local, global_], dim=1).detach()


@dataclass(frozen=True)
class _Call:
    """What decides a captured graph.

    Attributes:
        student: A's unmapped logits through the prompt.
        cached: rows of the feature bank that take part where they are not sampled.
        sampled: negatives come from a table.
        places: of the tables.
    """

    student: Student
    cached: int
    sampled: bool
    places: tuple[int, ...]
