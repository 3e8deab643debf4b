"""Label mapping: which output of A speaks for which class of a provider (SPEC section 3).

A mapping m is an int64 vector, one entry a provider class: ``mapped[:, j] = logits[:, m[j]]``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kiop_fast.errors import MappingError


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
