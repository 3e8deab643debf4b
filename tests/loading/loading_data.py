"""What the tests of loading share: pictures in memory and on disk, and both loaders."""

from __future__ import annotations

import pytest
import torch
from picture_files import pictures

from kiop_fast.config import LoadingConfig
from kiop_fast.data import DatasetInfo, Split

INFO = DatasetInfo(
    "waves", 24, 3, ("a", "b", "c"), (0.49, 0.48, 0.45), (0.20, 0.19, 0.21), pad=3, flip=0.5
)
DALI, TORCH = LoadingConfig(loader="dali", threads=1), LoadingConfig(loader="torch", threads=1)
BOTH = pytest.mark.parametrize("loading", [DALI, TORCH], ids=["dali", "torch"])
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def waves(count: int, side: int = 24, channels: int = 3) -> Split:
    made = torch.from_numpy(pictures(count, side, side, channels)).permute(0, 3, 1, 2)
    return Split(made.contiguous(), torch.arange(count) % 3)


def batch_of(feed: object, *tables: list[torch.Tensor] | None) -> torch.Tensor:
    (made,) = list(feed.batches(*tables))  # type: ignore[attr-defined]
    return made
