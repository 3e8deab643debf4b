"""Built-in task ``shapes``: ten filled figures in random colours, turned any way round."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kiop_fast.data.drawing import Floats, Look, Masks, draw, fill
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.runtime import draws

TRAIN_PER_CLASS = 300
TEST_PER_CLASS = 40
LOOK = Look(rotation=180.0, scale=(0.9, 1.15), shift=0.04, noise=0.04)


def _circle(radius: float, corners: int = 96, turn: float = 0.0) -> Floats:
    angle = 2 * np.pi * np.arange(corners) / corners + turn
    return radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)


def _box(width: float, height: float) -> Floats:
    return np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) * (width / 2, height / 2)


def _arc(start: float, stop: float, radius: float, centre: float = 0.0) -> Floats:
    angle = np.linspace(start, stop, 49)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + (centre, 0.0)


def _star() -> Floats:
    outer, inner = _circle(1.0, 5), _circle(0.4, 5, turn=np.pi / 5)
    return np.stack([outer, inner], axis=1).reshape(10, 2)


def _crescent() -> Floats:
    # A unit disc less a disc of radius 0.8 whose centre lies 0.5 to the right.
    meet = np.arccos((1 + 0.25 - 0.64) / (2 * 0.5))
    inner = np.arctan2(np.sin(meet), np.cos(meet) - 0.5)
    outside = _arc(meet, 2 * np.pi - meet, 1.0)
    return np.concatenate([outside, _arc(2 * np.pi - inner, inner, 0.8, centre=0.5)])


def _heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 97)[:-1]
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y], axis=1)


def outlines() -> dict[str, list[Floats]]:
    """Closed polygons of every figure, by its name."""
    arrow = [[-1, -0.28], [0.1, -0.28], [0.1, -0.8], [1, 0], [0.1, 0.8], [0.1, 0.28], [-1, 0.28]]
    return {
        "disc": [_circle(1.0)],
        "ring": [_circle(1.0), _circle(0.55)[::-1]],
        "half disc": [_arc(0, np.pi, 1.0)],
        "crescent": [_crescent()],
        "triangle": [_circle(1.0, 3)],
        "square": [_box(1.0, 1.0)],
        "star": [_star()],
        "cross": [_box(2.0, 0.6), _box(0.6, 2.0)],
        "heart": [_heart()],
        "arrow": [np.array(arrow, dtype=np.float64)],
    }


INFO = DatasetInfo("shapes", side=32, channels=3, classes=tuple(outlines()))


@lru_cache(maxsize=1)
def shape_masks() -> Masks:
    """Coverage of every figure, (1, 10, 128, 128) uint8."""
    return np.stack([fill(outline) for outline in outlines().values()])[None]


@lru_cache(maxsize=4)
def _read(split: str, side: int) -> Split:
    per_class = TRAIN_PER_CLASS if split == "train" else TEST_PER_CLASS
    return draw(shape_masks(), per_class, side, draws.generator(0, 0, "shapes", split), LOOK)


def train(side: int) -> Split:
    """The 3,000 training pictures at ``side``, drawn once a process."""
    return _read("train", side)


def test(side: int) -> Split:
    """The 400 test pictures at ``side``, drawn once a process."""
    return _read("test", side)


SHAPES = Dataset(INFO, train, test)
