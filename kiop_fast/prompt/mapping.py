"""Label mapping: which output of A speaks for which class of a provider (SPEC section 3).

A mapping m is an int64 vector, one entry a provider class: ``mapped[:, j] = logits[:, m[j]]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kiop_fast.errors import MappingError
from kiop_fast.runtime.execution import PLAIN

_LIKELY_ROWS = 1024  # images that a search looks at, at most
_FALL = 1e-9  # of its size: a loss that falls by less has not fallen


def check_class_counts(target: int, provider: int, names: tuple[str, str]) -> None:
    """Raise MappingError unless an injective mapping exists."""
    if provider > target:
        raise MappingError(
            f"{names[0]} has too few classes to speak for {names[1]}: the mapping is one-to-one",
            got=f"{names[0]}: {target} classes, {names[1]}: {provider} classes",
            expected=f"a target with at least {provider} classes",
            fix="swap target and provider, choose another target, or a provider of fewer classes",
        )


def random_mapping(rng: np.random.Generator, target: int, provider: int) -> Tensor:
    """RLM, the paper's default: a random injective mapping, (provider,) int64."""
    return torch.from_numpy(rng.permutation(target)[:provider].copy())


def disjoint_mappings(rng: np.random.Generator, target: int, providers: list[int]) -> list[Tensor]:
    """One permutation of A's classes sliced into disjoint parts, one a provider (upstream)."""
    if sum(providers) > target:
        raise MappingError(
            "disjoint mappings need a class of the target for every class of every provider",
            got=f"target: {target} classes, providers: {providers}",
            expected=f"a target with at least {sum(providers)} classes",
            fix="set prompt.disjoint=false",
        )
    order = torch.from_numpy(rng.permutation(target))
    return [part.clone() for part in order[: sum(providers)].split(providers)]


def count_table(target_argmax: Tensor, provider_argmax: Tensor, shape: tuple[int, int]) -> Tensor:
    """D[s, t]: images that the provider calls t and prompted A puts in class s; int64 ``shape``."""
    rows, columns = shape
    flat = target_argmax.long() * columns + provider_argmax.long()
    return torch.bincount(flat, minlength=rows * columns).view(rows, columns)


def frequency_mapping(table: Tensor) -> Tensor:
    """FLM: greedily match classes by count, (provider,) int64.

    Repeatedly the largest entry D[s, t] fixes m[t] = s and drops row s and column t.  Ties go to
    the lowest s, then the lowest t.  Provider classes that never occur take the lowest free s.
    """
    counts = table.cpu().numpy().astype(np.int64).copy()
    rows, columns = counts.shape
    check_class_counts(rows, columns, ("the target", "the provider"))
    absent = counts.sum(axis=0) == 0
    mapping = np.full(columns, -1, dtype=np.int64)
    for _ in range(columns - int(absent.sum())):
        open_counts = counts.copy()
        open_counts[:, absent] = -1
        s, t = np.unravel_index(open_counts.argmax(), counts.shape)
        mapping[t] = s
        counts[s, :] = -1
        counts[:, t] = -1
    free = iter(sorted(set(range(rows)) - set(mapping.tolist())))
    for t in np.flatnonzero(mapping < 0):
        mapping[t] = next(free)
    return torch.from_numpy(mapping)


@torch.no_grad()
def bank_logits(
    target: Callable[[Tensor], Tensor], provider: Callable[[Tensor], Tensor], images: Tensor,
    batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What prompted A and a provider say of one bank, for :func:`bank_mapping`.

    Args:
        target: images → (N, classes of A) logits.
        provider: the same images → (N, classes of the provider) logits.
        images: (M, …), the bank.
        batch: images a pass, at most.
    """
    with PLAIN.products(images.device):
        pairs = [(target(part), provider(part)) for part in images.chunk(-(-len(images) // batch))]
    ours, theirs = zip(*pairs, strict=True)
    return torch.cat(ours), torch.cat(theirs)


def bank_mapping(
    rule: str, target: Tensor, provider: Tensor, before: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """What a data-free rule makes of one bank.

    Args:
        rule: ``likelihood``, or one that counts: ``frequency``, ``iterative``.
        target: (M, classes of A) logits of prompted A.
        provider: (M, classes of the provider) its logits of the same images.
        before: the mapping so far, where ``likelihood`` starts; None: from a count.
        temperature: of the transfer loss.

    Returns:
        (classes of the provider,) int64 on the host.
    """
    if rule == "likelihood" and before is not None:
        return likelihood_mapping(target, provider, before, temperature)
    shape = (target.shape[1], provider.shape[1])
    counted = frequency_mapping(count_table(target.argmax(dim=1), provider.argmax(dim=1), shape))
    if rule == "likelihood":
        return likelihood_mapping(target, provider, counted, temperature)
    return counted


@torch.no_grad()
def likelihood_mapping(
    target: Tensor, provider: Tensor, start: Tensor, temperature: float = 1.0, shift: float = 0.5
) -> Tensor:
    """The mapping with which A speaks most like the provider, one move after the other.

    Over one-to-one m the mean of ``KL(softmax(provider / T) ‖ softmax(seen[:, m] / T))`` falls
    with every move (a class takes a free class of A, or two classes exchange theirs) until none
    lowers it.  ``seen`` is ``target`` less ``shift`` times each class's mean over the bank: how
    often a class is said at all is what a prompt changes first, so a mapping is chosen less for
    it.  At shift 0 this is the provider's term of the transfer loss, which prompt steps lower over
    the cells.  A count of arg-maxes knows neither how sure the models are nor that only mapped
    classes compete when the prompt is worn.

    Args:
        target: (M, classes of A) logits of prompted A; at most 1,024 evenly spaced rows are used.
        provider: (M, classes of the provider) its logits of the same images.
        start: (classes of the provider,) int64; the descent ends in a minimum near it.
        temperature: T of both sides.
        shift: of 0, 0.5 and 1, half served the demo best (docs/demo.md).

    Returns:
        (classes of the provider,) int64 on the host.

    Source: not in the paper, whose iterative mapping counts (:func:`frequency_mapping`).
    """
    every = -(-len(target) // _LIKELY_ROWS)
    logits = target[::every].double() / temperature
    logits = logits - shift * logits.mean(dim=0)
    wanted = (provider[::every].double() / temperature).softmax(dim=1)
    # The loss but for a constant: mean log Σ_t exp(logits[:, m_t]) − Σ_t said[m_t, t].
    said = logits.T @ wanted / len(logits)
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp().clamp_min(1e-300)
    mapping, still = start.to(target.device, copy=True), 0
    while still < len(mapping):
        for t in range(len(mapping)):
            moved = _move(t, mapping, said, weights)
            still = still + 1 if moved is None else 0
            mapping = mapping if moved is None else moved
    return mapping.cpu()


def _move(t: int, mapping: Tensor, said: Tensor, weights: Tensor) -> Tensor | None:
    """``mapping`` after the best move of class ``t``; None where none lowers the loss."""
    own = said[mapping, torch.arange(len(mapping), device=mapping.device)]
    changes = own[t] + own - said[mapping, t] - said[mapping[t]]  # by an exchange
    is_free = torch.ones(len(said), dtype=torch.bool, device=mapping.device)
    is_free[mapping] = False
    free = is_free.nonzero()[:, 0]
    if len(free):
        mapped = weights[:, mapping]
        others = mapped.index_fill(1, torch.tensor([t], device=mapping.device), 0).sum(dim=1)
        share = (others[:, None] + weights[:, free]) / mapped.sum(dim=1)[:, None]
        changes = torch.cat([changes, share.log().mean(dim=0) + own[t] - said[free, t]])
    best = int(changes.argmin())
    if not changes[best] < -_FALL * max(1.0, float(said.abs().max())):
        return None
    moved = mapping.clone()
    if best < len(mapping):
        moved[[t, best]] = mapping[[best, t]]
    else:
        moved[t] = free[best - len(mapping)]
    return moved
