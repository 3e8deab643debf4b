"""Built-in task ``digits``: the 1,797 scanned handwritten digits that scikit-learn ships."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from kiop_fast.data.resize import resize
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.runtime import draws

TEST_PER_CLASS = 36  # 360 test images

INFO = DatasetInfo("digits", side=8, channels=1, classes=tuple("0123456789"))


def split_indices(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Train and test rows: of every class, a fixed random 36 are for testing."""
    rng = draws.generator(0, 0, "digits", "split")
    test = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:TEST_PER_CLASS] for c in range(10)]
    )
    test = np.sort(test)
    return np.setdiff1d(np.arange(len(labels)), test), test


@lru_cache(maxsize=4)
def _read(side: int) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    scanned = load_digits()
    labels = scanned.target.astype(np.int64)
    pixels = np.rint(scanned.images * (255 / 16)).astype(np.uint8)  # 17 levels of ink
    images = resize(torch.from_numpy(pixels)[:, None], side)
    train_rows, test_rows = (torch.from_numpy(rows) for rows in split_indices(labels))
    numbers = torch.from_numpy(labels)
    return (
        Split(images[train_rows], numbers[train_rows]),
        Split(images[test_rows], numbers[test_rows]),
    )


def train(side: int) -> Split:
    """1,437 scans, (N, 1, side, side), bilinear from 8 pixels."""
    return _read(side)[0]


def test(side: int) -> Split:
    """360 scans, 36 of each digit."""
    return _read(side)[1]


DIGITS = Dataset(INFO, train, test)
