"""What a knowledge storing period needs before it starts: its draws, its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kiop_fast.config import StoringConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.runtime import draws


@dataclass(frozen=True)
class StoringDraws:
    """Batch indices, crops, flips and colour orders of one period and bank.

    Attributes:
        index: (steps, N) int64 into the bank.
        pad: zero padding the crops refer to, pixels.
        crop: (steps, N, 2) int64 top and left in the padded frame, or None.
        flip: (steps, N) bool, or None.
        colours: (steps, N, 3) int64 orders of the normalised channels, or None.
    """

    index: Tensor
    pad: int
    crop: Tensor | None
    flip: Tensor | None
    colours: Tensor | None = None


def augmentation(config: StoringConfig, info: DatasetInfo) -> tuple[int, float]:
    """Padding of the random crop, pixels, and probability of a flip."""
    return (info.pad, info.flip) if config.augment_as_dataset else (config.pad, config.flip)


def draw_storing(
    config: StoringConfig, info: DatasetInfo, population: int, batch: int, *,
    seed: int, epoch: int, task: str,
) -> StoringDraws:  # fmt: skip
    """Draw the batches of one bank for one period, from ``(seed, epoch, task, purpose)``."""
    pad, flip = augmentation(config, info)
    shape = (config.steps, batch)
    augment = draws.generator(seed, epoch, task, "bank augmentation")
    return StoringDraws(
        index=draws.permutation_batches(
            draws.generator(seed, epoch, task, "bank batches"), *shape, population
        ),
        pad=pad,
        crop=draws.crop_offsets(augment, shape, pad) if pad else None,
        flip=draws.flips(augment, shape, flip) if flip else None,
        colours=(
            draws.channel_orders(draws.generator(seed, epoch, task, "bank colours"), shape)
            if config.shuffle_colours and info.channels == 3
            else None
        ),
    )


def in_drawn_colours(batch: Tensor, orders: Tensor | None) -> Tensor:
    """(N, 3, s, s) with each image's channels in its drawn order, (N, 3)."""
    if orders is None:
        return batch
    rows = torch.arange(len(batch), device=batch.device)[:, None]
    return batch[rows, orders.to(batch.device)]


def learning_rate(config: StoringConfig, epoch: int, epochs: int) -> float:
    """Cosine over the epochs, constant within one."""
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
