"""Two datasets with test splits of noise, and a source for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stand_ins import tiny_source
from tiny_tasks import COLOUR, GREY, never, pixels

from kiop_fast import data
from kiop_fast.data import Dataset, Split
from kiop_fast.source import Source, freeze


@pytest.fixture(autouse=True)
def _datasets() -> Iterator[None]:
    """Two datasets with test splits of noise, 50 and 23 images."""
    for info, count in ((COLOUR, 50), (GREY, 23)):
        split = Split(pixels(count, info.channels, count),
                      torch.arange(count) % len(info.classes))  # fmt: skip
        data.registry._DATASETS[info.name] = Dataset(info, never, lambda side, s=split: s)
    yield
    for info in (COLOUR, GREY):
        del data.registry._DATASETS[info.name]


@pytest.fixture
def target() -> Source:
    return freeze(tiny_source("a", 6, seed=1).model, COLOUR, name="tiny@colours", arch="tiny")


@pytest.fixture
def provider() -> Source:
    return freeze(tiny_source("b", 4, seed=2).model, GREY, name="tiny@greys", arch="tiny")
