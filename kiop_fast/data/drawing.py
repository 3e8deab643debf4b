"""Draw labelled pictures in NumPy: outlines filled to masks, masks posed, coloured and noised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kiop_fast.data.spec import Split

MASK_SIDE = 128  # pixels of a high-resolution mask
MASK_FILL = 96  # of which the longer side of a figure takes so many
_FILL_SAMPLES = 3  # samples a mask pixel and axis
_CHUNK = 512  # images drawn at once

Floats = NDArray[np.float64]
Masks = NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """How much the pictures of one class differ; every value is the edge of a uniform draw."""

    rotation: float = 12.0  # degrees to either side
    scale: tuple[float, float] = (0.75, 1.05)
    stretch: float = 0.1  # extra scale of each axis, to either side of 1
    shift: float = 0.08  # fraction of the image side, to either side
    contrast: float = 0.35  # least difference in luminance of ink and paper
    grey: float = 0.3  # share of pictures without colour
    chalk: bool = False  # light ink on dark paper only
    noise: float = 0.06  # standard deviation of Gaussian pixel noise, drawn from 0 to this


def fill(outline: Sequence[Floats]) -> Masks:
    """Coverage of a figure by the non-zero winding rule, (128, 128) uint8, centred and scaled.

    Args:
        outline: closed polygons, (points, 2) each, x to the right and y upwards, in any unit.
    """
    points = np.concatenate(list(outline))
    low, high = points.min(axis=0), points.max(axis=0)
    scale = MASK_FILL / (high - low).max()
    middle = (low + high) / 2
    side = MASK_SIDE * _FILL_SAMPLES
    winding = np.zeros((side, side + 1), np.int32)
    rows = np.arange(side) + 0.5
    for polygon in outline:
        flipped = (polygon - middle) * (scale, -scale)
        start = (flipped + MASK_SIDE / 2) * _FILL_SAMPLES
        x0, y0 = start.T
        x1, y1 = np.roll(start, -1, axis=0).T
        crosses = (y0 <= rows[:, None]) != (y1 <= rows[:, None])
        row, edge = np.nonzero(crosses)
        slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
        x = x0[edge] + (rows[row] - y0[edge]) * slope
        column = np.clip(np.ceil(x - 0.5), 0, side).astype(np.int64)
        np.add.at(winding, (row, column), np.where(y1[edge] > y0[edge], 1, -1))
    inside = np.cumsum(winding, axis=1)[:, :side] != 0
    blocks = inside.reshape(MASK_SIDE, _FILL_SAMPLES, MASK_SIDE, _FILL_SAMPLES)
    return np.rint(blocks.mean(axis=(1, 3)) * 255).astype(np.uint8)


def draw(masks: Masks, per_class: int, side: int, rng: np.random.Generator, look: Look) -> Split:
    """Pictures of every class in turn (0, 1, …, 0, 1, …), (N, 3, side, side) uint8.

    Args:
        masks: (variants, classes, 128, 128), coverage of each figure.
    """
    variants, classes = masks.shape[:2]
    count = classes * per_class
    labels = np.arange(count) % classes
    variant = rng.integers(0, variants, count)
    matrix, move = _poses(rng, count, look)
    ink, paper = _colours(rng, count, look)
    sigma = rng.uniform(0, look.noise, (count, 1, 1, 1))
    images = np.empty((count, 3, side, side), np.uint8)
    for first in range(0, count, _CHUNK):
        part = slice(first, min(first + _CHUNK, count))
        cover = _posed(masks, variant[part], labels[part], matrix[part], move[part], side)
        picture = paper[part] + cover[:, None] * (ink[part] - paper[part])
        picture = picture + sigma[part] * rng.standard_normal(picture.shape)
        images[part] = np.rint(np.clip(picture, 0, 1) * 255)
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _poses(rng: np.random.Generator, count: int, look: Look) -> tuple[Floats, Floats]:
    """Inverse poses: place p of a picture, in [-1, 1]², shows place ``matrix @ p + move``."""
    angle = np.deg2rad(rng.uniform(-look.rotation, look.rotation, count))
    size = rng.uniform(*look.scale, (count, 1))
    size = size * rng.uniform(1 - look.stretch, 1 + look.stretch, (count, 2))
    move = rng.uniform(-2 * look.shift, 2 * look.shift, (count, 2))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return turn.transpose(2, 0, 1) / size[:, :, None], move


def _colours(rng: np.random.Generator, count: int, look: Look) -> tuple[Floats, Floats]:
    """Ink and paper, (count, 3, 1, 1) each, uniform in RGB and far enough apart in luminance."""
    grey = rng.random(count) < look.grey
    pairs = np.empty((count, 2, 3))
    todo = np.arange(count)
    while len(todo):
        drawn = rng.random((len(todo), 2, 3))
        drawn = np.where(grey[todo, None, None], drawn[..., :1], drawn)
        if look.chalk:
            drawn[:, 1] *= 0.4
        pairs[todo] = drawn
        difference = (drawn[:, 0] - drawn[:, 1]) @ np.array([0.299, 0.587, 0.114])
        todo = todo[(difference if look.chalk else np.abs(difference)) < look.contrast]
    return pairs[:, 0, :, None, None], pairs[:, 1, :, None, None]


def _posed(
    masks: Masks, variant: NDArray[np.int64], labels: NDArray[np.int64], matrix: Floats,
    move: Floats, side: int,
) -> Floats:  # fmt: skip
    """Coverage of each picture's pixels, (N, side, side) in [0, 1], by nearest mask pixels."""
    samples = max(1, -(-64 // side))  # a pixel and axis
    fine = side * samples
    centre = (2 * np.arange(fine) + 1) / fine - 1
    x = centre[None, None, :] * matrix[:, 0, 0, None, None] + move[:, 0, None, None]
    x = x + centre[None, :, None] * matrix[:, 0, 1, None, None]
    y = centre[None, None, :] * matrix[:, 1, 0, None, None] + move[:, 1, None, None]
    y = y + centre[None, :, None] * matrix[:, 1, 1, None, None]
    column = np.floor((x + 1) * (MASK_SIDE / 2)).astype(np.int64)
    row = np.floor((y + 1) * (MASK_SIDE / 2)).astype(np.int64)
    # No figure reaches the mask's rim, so what lies outside looks like the rim.
    column, row = np.clip(column, 0, MASK_SIDE - 1), np.clip(row, 0, MASK_SIDE - 1)
    figure = (variant * masks.shape[1] + labels)[:, None, None]
    taken = masks.reshape(-1)[(figure * MASK_SIDE + row) * MASK_SIDE + column]
    blocks = taken.reshape(-1, side, samples, side, samples)
    cover: Floats = blocks.sum(axis=(2, 4), dtype=np.int64) / (255.0 * samples * samples)
    return cover
