"""Epochs by DALI and by torch: sizes, order, shards, seeds, and memory that stays."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from loading_data import BOTH, DALI, INFO, gpu, waves

from kiop_fast.config import LoadingConfig
from kiop_fast.data import FileSplit, Split, dali, open_loader
from kiop_fast.errors import DataError

pytest.importorskip("nvidia.dali")


@BOTH
@pytest.mark.parametrize(
    ("count", "batch", "last", "sizes"),
    [
        (20, 8, "keep", [8, 8, 4]),
        (20, 8, "drop", [8, 8]),
        (16, 8, "keep", [8, 8]),
        (3, 8, "keep", [3]),  # fewer batches than DALI prepares ahead
        (1, 1, "drop", [1]),
    ],
)
def test_epoch_sizes(
    loading: LoadingConfig, count: int, batch: int, last: str, sizes: list[int]
) -> None:
    loader = open_loader(waves(count), INFO, batch=batch, last=last, loading=loading)
    for epoch in range(3):
        assert [len(x) for x, _ in loader.epoch(epoch)] == sizes
    assert (len(loader), loader.size) == (len(sizes), sum(sizes))


@BOTH
def test_a_test_loader_shows_all_in_order(loading: LoadingConfig) -> None:
    split = waves(10)
    loader = open_loader(split, INFO, batch=4, training=False, normalise=False, loading=loading)
    images, labels = zip(*loader.epoch(), strict=True)
    assert (torch.cat(images) - split.images / 255).abs().max() < 1e-6
    assert torch.equal(torch.cat(labels), split.labels)


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_shards_share_an_epoch(shards: int) -> None:
    split = Split(waves(11).images, torch.arange(11))
    seen = []
    for i in range(shards):
        loader = open_loader(split, INFO, batch=2, last="keep", shard=(i, shards), loading=DALI)
        mine = torch.cat([labels for _, labels in loader.epoch(5)]).tolist()
        assert len(mine) == loader.size in (11 // shards, -(-11 // shards))
        seen += mine
    assert sorted(seen) == list(range(11))


@BOTH
def test_seed_and_epoch_decide_the_order(loading: LoadingConfig) -> None:
    def one(seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        loader = open_loader(waves(12), INFO, batch=12, seed=seed, loading=loading)
        ((images, labels),) = loader.epoch(epoch)
        return images, labels

    first, again = one(1, 3), one(1, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], one(2, 3)[0])
    assert not torch.equal(first[0], one(1, 4)[0])


def test_one_pipeline_for_all_epochs_and_batches_that_stay(files: FileSplit) -> None:
    """Batches kept over three epochs still hold what they held: DALI reuses no buffer of theirs."""
    for split in (waves(20), FileSplit(files.paths, files.labels, 24, 3)):
        loading = LoadingConfig(loader="dali", threads=1, memory_gb=0)
        loader = open_loader(split, INFO, batch=4, loading=loading)
        runner = getattr(loader.feed, "feed", loader.feed).runner
        pipeline = weakref.ref(runner.pipeline)
        kept = [x for epoch in range(3) for x, _ in loader.epoch(epoch)]
        copies = [x.clone() for epoch in range(3) for x, _ in loader.epoch(epoch)]
        assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))
        assert runner.pipeline is pipeline()


def test_the_hand_over_copies_nothing() -> None:
    """DALI's own buffer is where the tensor's data lies."""
    runner = dali.DaliFeed(
        lambda rows: waves(4).images[rows], side=24, channels=3, batch=4, normaliser=None,
        device=torch.device("cpu"),
    ).runner  # fmt: skip
    places = []
    take = runner.pipeline.share_outputs

    def watched(stream: object = None) -> tuple[object, ...]:
        made = take(stream)
        places.append(made[0].data_ptr() if hasattr(made[0], "data_ptr") else None)
        places[-1] = places[-1] or made[0].as_tensor().data_ptr()
        return made

    runner.pipeline.share_outputs = watched
    inputs = {"images": waves(4).images.numpy(), "flip": np.zeros(4, np.int32)}
    made = list(runner.run([inputs]))
    assert [x.data_ptr() for x in made] == places


def test_a_loop_left_early_leaves_nothing_behind() -> None:
    loader = open_loader(waves(20), INFO, batch=4, loading=DALI)
    first = [x.clone() for x, _ in loader.epoch(0)]
    for epoch in (0, 0):
        for x, _ in loader.epoch(epoch):
            assert torch.equal(x, first[0])
            break
    assert all(torch.equal(x, y) for (x, _), y in zip(loader.epoch(0), first, strict=True))
    running = loader.epoch(0)
    next(running)
    with pytest.raises(DataError, match="two loops"):
        next(loader.epoch(1))
    running.close()
    assert len(list(loader.epoch(1))) == 5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_twenty_epochs(files: FileSplit) -> None:
    """Resident pages after epochs 4 to 20 through one pipeline differ by less than a batch kept
    per epoch would make: 20 epochs of 1,024 images of 12 KB are 240 MB, 5 MB are allowed."""
    split = waves(1024, side=32)
    loader = open_loader(split, INFO, batch=64, loading=DALI)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    after = []
    for epoch in range(20):
        for images, _ in loader.epoch(epoch):
            assert len(images) == 64
        after.append(resident())
    assert max(after[4:]) - after[3] < 5


@pytest.mark.gpu
@gpu
def test_gpu_batches_that_are_kept_stay_what_they_were() -> None:
    """While torch writes over freed memory and DALI makes the next batches."""
    loader = open_loader(waves(64), INFO, batch=8, loading=DALI, device="cuda")
    kept, copies = [], []
    for epoch in range(4):
        for x, _ in loader.epoch(epoch):
            kept.append(x)
            copies.append(x.clone())
            torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))
