"""The transfer loss: one term a bank (paper eqs. 5, 6 and 8; SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kiop_fast.kernels import MappedKL, mapped_kl
from kiop_fast.prompt import PromptedModel
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
        loss: normalised batch (N, 3, s, s) → loss and arg-max agreement.
        feed: makes the batches in the bank's stead (DALI); None: the kernel ``bank_replay``.
    """

    name: str
    weight: float
    bank: Bank
    source: Source
    average_grey: bool
    loss: Callable[[Tensor], MappedKL]
    feed: Feed | None = None


def core_loss(
    prompted: PromptedModel, temperature: float, target_side: str
) -> Callable[[Tensor], MappedKL]:
    """A keeps its own job: KL_T between A through the core and plain A (paper eq. 5).

    With ``target_side="prompted"``, as upstream, the prompted output is the KL's target and the
    gradient flows through the target's side; ``"plain"`` makes plain A the target.
    """

    def loss(images: Tensor) -> MappedKL:
        with torch.no_grad():
            plain = prompted.plain_logits(images)
        seen = prompted.logits(images)
        if target_side == "prompted":
            return mapped_kl(plain, seen, None, temperature)
        return mapped_kl(seen, plain, None, temperature)

    return loss


def provider_loss(
    prompted: PromptedModel, provider: Source, temperature: float, target_side: str
) -> Callable[[Tensor], MappedKL]:
    """A learns a provider's job: KL_T(B(x) ‖ mapped A(γ x)) (paper eq. 6)."""

    def loss(images: Tensor) -> MappedKL:
        with torch.no_grad():
            theirs = provider.model(images)
        seen = prompted.logits(images)
        if target_side == "provider":
            return mapped_kl(seen, theirs, prompted.mapping, temperature)
        assert prompted.mapping is not None
        return mapped_kl(theirs, seen[:, prompted.mapping], None, temperature)

    return loss


def vanilla_loss(
    student: nn.Module, provider: Source, temperature: float
) -> Callable[[Tensor], MappedKL]:
    """Mode ``vanilla``: a trainable copy of A imitates B, no prompt (SPEC section 6)."""

    def loss(images: Tensor) -> MappedKL:
        with torch.no_grad():
            theirs = provider.model(images)
        return mapped_kl(student(images), theirs, None, temperature)

    return loss
