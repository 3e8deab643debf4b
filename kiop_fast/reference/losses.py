"""The terms of both periods' losses in stock PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiop_fast.prompt import PromptedModel
from kiop_fast.reference.networks import Head
from kiop_fast.source import Source


class Distilled(NamedTuple):
    """loss: 0-d.  agreement: 0-d int64, rows with equal arg-max."""

    loss: Tensor
    agreement: Tensor


def kl(logits: Tensor, targets: Tensor, temperature: float, reduction: str = "batchmean") -> Tensor:
    """T² · KL(softmax(targets / T) ‖ softmax(logits / T)); gradients to both sides."""
    log_q = F.log_softmax(logits / temperature, dim=1)
    p = F.softmax(targets / temperature, dim=1)
    return F.kl_div(log_q, p, reduction=reduction) * temperature**2


def adversarial_loss(student: Tensor, teacher: Tensor, mapping: Tensor | None) -> Tensor:
    """L_adv = -mean_i(1[argmax t_i = argmax s_i] KL(softmax t_i ‖ softmax s_i)), 0-d.

    Args:
        student: (N, classes of A) unmapped logits.
        teacher: (N, classes of the teacher) logits.
        mapping: A's class for each of the teacher's; None where A is the teacher.
    """
    if mapping is not None:
        student = student[:, mapping]
    agrees = (student.max(1)[1] == teacher.max(1)[1]).to(student.dtype)
    return -(kl(student, teacher, 1.0, "none").sum(1) * agrees).mean()


def contrastive_loss(
    head: Head,
    local: Tensor,
    global_: Tensor,
    cached_local: Tensor,
    cached_global: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE over the full projection of batch and cached rows, keys detached, 0-d (eq. 3).

    Args:
        local, global_: (N, F) features of this batch.
        cached_local, cached_global: (n, F) rows of the feature bank; n may be 0.
    """
    projected = head(torch.cat([local, cached_local, global_, cached_global]))
    queries, keys = projected.chunk(2)
    logits = torch.mm(queries, keys.detach().T) / temperature  # (N + n, N + n)
    labels = torch.arange(len(logits), device=logits.device)
    losses = F.cross_entropy(logits, labels, reduction="none")
    if len(cached_local):
        return losses[: len(local)].mean() + losses[len(local) :].mean()
    return losses.mean()


def _distilled(logits: Tensor, targets: Tensor, temperature: float) -> Distilled:
    agrees = logits.max(1)[1] == targets.max(1)[1]
    return Distilled(kl(logits, targets, temperature), agrees.sum())


def core_loss(
    prompted: PromptedModel, temperature: float, target_side: str
) -> Callable[[Tensor], Any]:
    """A keeps its own job (paper eq. 5); ``prompted`` or ``plain`` A is the KL's target.

    Returns:
        normalised batch → :class:`Distilled`, as a ``Term`` of the transfer loss wants it.
    """

    def loss(images: Tensor) -> Distilled:
        seen = prompted.logits(images)
        plain = prompted.plain_logits(images)
        if target_side == "prompted":
            return _distilled(plain, seen, temperature)
        return _distilled(seen, plain, temperature)

    return loss


def provider_loss(
    prompted: PromptedModel, provider: Source, temperature: float, target_side: str
) -> Callable[[Tensor], Any]:
    """A learns a provider's job (paper eq. 6); ``provider`` or ``prompted`` is the KL's target."""

    def loss(images: Tensor) -> Distilled:
        with torch.no_grad():
            theirs = provider.model(images)
        seen = prompted(images)
        if target_side == "provider":
            return _distilled(seen, theirs, temperature)
        return _distilled(theirs, seen, temperature)

    return loss


def vanilla_loss(
    student: nn.Module, provider: Source, temperature: float
) -> Callable[[Tensor], Any]:
    """Mode ``vanilla``: a trainable copy of A imitates B, no prompt (SPEC section 6)."""

    def loss(images: Tensor) -> Distilled:
        with torch.no_grad():
            theirs = provider.model(images)
        return _distilled(student(images), theirs, temperature)

    return loss
