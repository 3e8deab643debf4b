"""The transfer loss: one term a bank (paper eqs. 5, 6 and 8; SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kiop_fast.kernels import MappedKL, mapped_kl
from kiop_fast.prompt import PromptedModel
from kiop_fast.runtime.profile import stage
from kiop_fast.source import Source


class Feed(Protocol):
    """Another maker of a bank's batches than the kernel: :class:`kiop_fast.data.Feed`."""

    def batches(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None = None,
        flip: Iterable[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Normalised (N, 3, s, s) for every table of rows."""


class Bank(Protocol):
    """Images a term learns from; each engine has its own store behind it."""

    @property
    def images(self) -> Tensor:
        """(M, C, s, s) uint8."""


@dataclass(frozen=True)
class Term:
    """One summand of the transfer loss.

    Attributes:
        name: the task.
        weight: α or β.
        bank: where its images come from.
        source: whose statistics normalise them.
        average_grey: RGB images of a grey task are averaged over the channels (upstream).
        loss: normalised batch (N, 3, s, s) → loss and arg-max agreement.  Where it has an
            attribute ``constant``, normalised images → logits that depend on nothing but each
            image, it may be given these as well.
        feed: makes the batches in the bank's stead (DALI); None: the kernel ``bank_replay``.
    """

    name: str
    weight: float
    bank: Bank
    source: Source
    average_grey: bool
    loss: Callable[..., MappedKL]
    feed: Feed | None = None


@dataclass(frozen=True)
class Imitation:
    """KL_T between a model that learns and one that does not, either as the target.

    Attributes:
        learner: normalised images → logits of the one that learns.
        model: the same of the one that does not.
        alone: ``model``'s logits of an image do not depend on its batch.
        mapping: class of the learner for each class of ``model``; None: the same classes.
        learner_is_target: which side of the KL the learner is.
    """

    learner: Callable[[Tensor], Tensor]
    model: Callable[[Tensor], Tensor]
    alone: bool
    mapping: Tensor | None
    temperature: float
    learner_is_target: bool

    @property
    def constant(self) -> Callable[[Tensor], Tensor] | None:
        return self.model if self.alone else None

    def __call__(self, images: Tensor, constant: Tensor | None = None) -> MappedKL:
        if constant is None:
            with torch.no_grad(), stage("frozen model"):
                constant = self.model(images)
        with stage("prompted model"):
            seen = self.learner(images)
        if not self.learner_is_target:
            return mapped_kl(seen, constant, self.mapping, self.temperature)
        if self.mapping is not None:
            seen = seen.index_select(1, self.mapping)
        return mapped_kl(constant, seen, None, self.temperature)


def core_loss(prompted: PromptedModel, temperature: float, target_side: str) -> Imitation:
    """A keeps its own job: KL_T between A through the core and plain A (paper eq. 5).

    With ``target_side="prompted"``, as upstream, the prompted output is the KL's target and the
    gradient flows through the target's side; ``"plain"`` makes plain A the target.
    """
    alone = prompted.batchnorm == "running" and prompted.dropout is None
    return Imitation(
        prompted.logits, prompted.plain_logits, alone, None, temperature, target_side == "prompted"
    )


def provider_loss(
    prompted: PromptedModel, provider: Source, temperature: float, target_side: str
) -> Imitation:
    """A learns a provider's job: KL_T(B(x) ‖ mapped A(γ x)) (paper eq. 6)."""
    return Imitation(
        prompted.logits, provider.logits, True, prompted.mapping, temperature,
        target_side != "provider",
    )  # fmt: skip


def vanilla_loss(student: nn.Module, provider: Source, temperature: float) -> Imitation:
    """Mode ``vanilla``: a trainable copy of A imitates B, no prompt (SPEC section 6)."""
    return Imitation(student, provider.logits, True, None, temperature, False)
