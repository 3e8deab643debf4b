"""Randomness is data: every random number of a run, drawn on the host before a period starts.

A draw is named by ``(seed, epoch, task, purpose)``; the name is hashed into the key of a
counter-based generator (Philox), so no draw depends on the order of any other.  Engines,
resumed runs and tests that ask for the same name get the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, epoch: int, task: str, purpose: str) -> np.random.Generator:
    """The NumPy generator whose stream belongs to this name alone."""
    name = f"{seed}\x1f{epoch}\x1f{task}\x1f{purpose}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class ViewDraws:
    """Crop boxes and flips of the two random views, one row a step.

    Attributes:
        crop: (steps, N, 2) int64, top and left of the global view in the padded frame.
        crop_flip: (steps, N) bool.
        box: (steps, N, 4) int64, top, left, height, width of the local view.
        box_flip: (steps, N) bool.
    """

    crop: Tensor
    crop_flip: Tensor
    box: Tensor
    box_flip: Tensor


def crop_offsets(rng: np.random.Generator, shape: tuple[int, ...], pad: int) -> Tensor:
    """Uniform (top, left) of an s×s crop from a frame padded by ``pad``; shape (*shape, 2)."""
    return torch.from_numpy(rng.integers(0, 2 * pad + 1, (*shape, 2)))


def flips(rng: np.random.Generator, shape: tuple[int, ...], probability: float) -> Tensor:
    """Bernoulli(probability) as bool, of ``shape``."""
    return torch.from_numpy(rng.random(shape) < probability)


def channel_orders(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Uniform orders of three channels, (*shape, 3) int64."""
    return torch.from_numpy(rng.random((*shape, 3)).argsort(axis=-1))


def resized_crop_boxes(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    side: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Boxes of random resized crops, (*shape, 4) int64: top, left, height, width.

    Area is uniform in ``scale`` (fractions of side²), aspect ratio log-uniform in ``ratio``.
    As in torchvision and kornia, ten tries are made for a box that fits; then the largest box
    of an allowed ratio is taken.
    """
    count = int(np.prod(shape))
    area = rng.uniform(scale[0], scale[1], (count, 10)) * side * side
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), (count, 10)))
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.argmax(axis=1)
    rows = np.arange(count)
    some = fits.any(axis=1)
    width = np.where(some, width[rows, first], max(1, round(side * min(1.0, ratio[1]))))
    height = np.where(some, height[rows, first], max(1, round(side / max(1.0, ratio[0]))))
    top = np.floor(rng.random(count) * (side - height + 1)).astype(np.int64)
    left = np.floor(rng.random(count) * (side - width + 1)).astype(np.int64)
    return torch.from_numpy(np.stack([top, left, height, width], axis=1).reshape(*shape, 4))


def permutation_batches(
    rng: np.random.Generator, steps: int, batch: int, population: int
) -> Tensor:
    """Batch indices from consecutive permutations, (steps, batch) int64.

    Without replacement inside a permutation; batches are always full and cross from one
    permutation into the next (SPEC section 5).
    """
    needed = steps * batch
    rounds = -(-needed // population)
    order = np.concatenate([rng.permutation(population) for _ in range(rounds)])
    return torch.from_numpy(order[:needed].reshape(steps, batch))


def sorted_targets(rng: np.random.Generator, count: int, classes: int, *, balanced: bool) -> Tensor:
    """Sorted class targets, (count,) int64: uniform, or as even as ``count`` allows."""
    if balanced:
        order = rng.permutation(classes)
        targets = order[np.arange(count) % classes]
    else:
        targets = rng.integers(0, classes, count)
    return torch.from_numpy(np.sort(targets).astype(np.int64))


def negative_rows(
    rng: np.random.Generator, steps: int, stored: int, negatives: int
) -> Tensor | None:
    """Feature-bank rows that serve as negatives, (steps, negatives) int64.

    None while ``stored <= negatives``: the sample is then a permutation of the bank, and the
    contrastive loss does not depend on its order.
    """
    if stored <= negatives:
        return None
    rows = [rng.choice(stored, negatives, replace=False, shuffle=False) for _ in range(steps)]
    return torch.from_numpy(np.stack(rows))


def normal(rng: np.random.Generator, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Gaussian fp32 tensor of ``shape``."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(std).add_(mean)
