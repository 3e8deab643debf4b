"""Data paths: a bank as normalised batches, cropped and flipped as drawn, by everyone who can.

One pass over the bank, 64 images a batch.  ``reference`` reads PNG files in four processes, as
upstream; ``torch`` and ``dali`` are the loaders of ``kiop_fast.data``; ``fast`` is bank_replay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gates
import pytest
import torch
from measure import Measure
from sizes import Scale
from torch import Tensor
from world import MEAN, STD, make_source, smooth_images

from kiop_fast.data.spec import DatasetInfo, Split
from kiop_fast.kernels import bank_replay
from kiop_fast.reference import ImageBank
from kiop_fast.reference.storing import _batches
from kiop_fast.runtime import draws
from kiop_fast.store import StoringDraws, Term

BATCH, SIDE, PAD = 64, 32, 4
PATHS = ("reference", "one process", "torch", "dali", "fast")


def tables(count: int) -> StoringDraws:
    """One permutation of the bank, crops and flips."""
    steps = count // BATCH
    rng = draws.generator(0, 0, "data paths", "benchmark")
    index = draws.permutation_batches(rng, steps, BATCH, count)
    crop = draws.crop_offsets(rng, (steps, BATCH), PAD)
    return StoringDraws(index, PAD, crop, draws.flips(rng, (steps, BATCH), 0.5))


def png_path(
    images: Tensor, drawn: StoringDraws, device: torch.device, folder: Path, workers: int
) -> Callable[[], Iterator[Tensor]]:
    """The reference's PNG store behind its DataLoader."""
    bank = ImageBank(3, SIDE, device, folder, workers)
    bank.add(images, torch.zeros(len(images), dtype=torch.int64))
    source = make_source("resnet8", 10, SIDE, 0)
    term = Term("bank", 1.0, bank, source, False, lambda batch: None)  # type: ignore[arg-type, return-value]
    return lambda: _batches(term, drawn)


def loader_path(
    kind: str, images: Tensor, drawn: StoringDraws, device: torch.device
) -> Callable[[], Iterator[Tensor]]:
    """kiop_fast's loader of real images, by DALI or torch, over the same bytes in memory."""
    from kiop_fast.config import LoadingConfig
    from kiop_fast.data.loader import open_feed

    info = DatasetInfo("bank", SIDE, 3, ("one",), mean=MEAN, std=STD)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    feed, _ = open_feed(split, info, batch=BATCH, pad=PAD, device=device,
                        loading=LoadingConfig(loader=kind))  # fmt: skip
    return lambda: feed.batches(drawn.index, drawn.crop, drawn.flip)


def replay_path(
    images: Tensor, drawn: StoringDraws, device: torch.device
) -> Callable[[], Iterator[Tensor]]:
    """bank_replay from a bank on the device, its tables there too."""
    bank, mean, std = (
        images.to(device),
        torch.tensor(MEAN, device=device),
        torch.tensor(STD, device=device),
    )
    assert drawn.crop is not None
    assert drawn.flip is not None
    index, crop, flip = (t.to(device) for t in (drawn.index, drawn.crop, drawn.flip))

    def batches() -> Iterator[Tensor]:
        for step in range(len(index)):
            yield bank_replay(
                bank, index[step], crop=crop[step], flip=flip[step], pad=PAD, mean=mean, std=std
            )

    return batches


def read_through(batches: Iterator[Tensor]) -> int:
    """Every batch, none of them kept."""
    return sum(len(batch) for batch in batches)


@pytest.mark.parametrize("path", PATHS)
def test_data_path(
    path: str, sizes: Scale, measure: Measure, once: Callable[..., Any], tmp_path: Path
) -> None:
    device, count = measure.session.device, sizes.data_bank
    images, drawn = smooth_images(count, SIDE), tables(count)
    stage = f"bank of {count} as batches of {BATCH}"
    try:
        if path in ("reference", "one process"):
            make = png_path(images, drawn, device, tmp_path, 4 if path == "reference" else 0)
        elif path == "fast":
            make = replay_path(images, drawn, device)
        else:
            make = loader_path(path, images, drawn, device)
    except Exception as error:  # whatever a loader that is not there raises is the reason
        measure.unavailable(stage, path, str(error).partition("\n")[0])
        return

    def by_reference() -> Tensor:
        return torch.cat(list(png_path(images, drawn, device, tmp_path / "expected", 0)()))

    expected = once(by_reference, "data", count)
    gates.check_equal("batches", torch.cat([b.clone() for b in make()]), expected, 1e-5)
    digest = hashlib.sha256(f"{count} {BATCH} {SIDE} {PAD}".encode()).hexdigest()[:12]
    written = count * 3 * SIDE * SIDE * 4
    measure(
        lambda: read_through(make()), group="data paths", stage=stage, engine=path,
        precision="fp32", digest=digest, per=len(drawn.index), rounds=3, warm=1,
        bytes_moved=written * 1.25,
    )  # fmt: skip
