"""Batches of a dataset's split, by DALI or by torch.

``open_loader(dataset("cifar10").train(32), info, batch=64).epoch(0)`` yields ``(images, labels)``:
normalised (N, 3, s, s) on the loader's device and (N,) int64.  Open a loader once and read every
epoch from it; ``LoadingConfig(loader="dali" | "torch" | "auto")`` chooses who makes the batches,
which show the same pictures, crops and flips either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kiop_fast.config import LoadingConfig
from kiop_fast.data import dali
from kiop_fast.data.files import (
    FileSplit,
    decoding_threads,
    does_not_decode,
    make_decoder,
    undecodable,
)
from kiop_fast.data.folder import PREFIX
from kiop_fast.data.names import DOWNLOADED
from kiop_fast.data.spec import DatasetInfo, Split
from kiop_fast.data.torch_feed import TorchFeed
from kiop_fast.errors import DataError
from kiop_fast.runtime import draws


class Feed(Protocol):
    """Who makes batches from drawn tables."""

    kind: str

    def batches(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None = None,
        flip: Iterable[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """A batch for every table of rows.

        Args:
            index: (N,) int64, rows of the split.
            crop: (N, 2) top and left in the black frame of ``pad`` pixels; None: no crop.
            flip: (N,) bool, mirror left to right; None: none.

        Returns:
            (N, 3, s, s) normalised, or (N, C, s, s) in [0, 1] where there is no normaliser.
        """


def open_feed(
    split: Split | FileSplit, info: DatasetInfo, *, batch: int, pad: int = 0,
    normalise: bool = True, device: torch.device | str = "cpu",
    loading: LoadingConfig | None = None,
) -> tuple[Feed, Tensor]:  # fmt: skip
    """A feed over a split, built once for all epochs, and the labels of its rows.

    Files whose decoded bytes stay below ``loading.memory_gb`` are decoded once and kept as
    uint8; others are decoded anew for every batch.

    Raises:
        DataError: DALI asked for and not installed; files that do not decode.
    """
    loading, device = loading or LoadingConfig(), torch.device(device)
    kept = held(split, loading, device)
    gather: Callable[[Tensor], Tensor] | Sequence[Path]
    if isinstance(kept, FileSplit):
        side, channels, gather = kept.side, kept.channels, kept.paths
    else:
        images = kept.images.to(device)
        channels, side = images.shape[1], images.shape[-1]
        gather = partial(_rows, images)
    settings: dict[str, Any] = {
        "side": side, "channels": channels, "pad": pad, "device": device,
        "normaliser": (info.mean, info.std) if normalise else None,
        "threads": decoding_threads(loading),
    }  # fmt: skip
    made: Feed
    if uses_dali(loading, info, split):
        made = dali.DaliFeed(gather, batch=batch, prefetch=loading.prefetch, **settings)
    else:
        made = TorchFeed(gather, **settings)
    return (_Named(made, kept, loading) if isinstance(kept, FileSplit) else made), kept.labels


def held(
    split: Split | FileSplit, loading: LoadingConfig, device: torch.device | str = "cpu"
) -> Split | FileSplit:
    """Files decoded into memory where they fit ``loading.memory_gb``; others checked, if asked."""
    if not isinstance(split, FileSplit):
        return split
    if split.size > loading.memory_gb * 1e9:
        return split.checked(loading)
    return split.decoded(loading, device)


def uses_dali(loading: LoadingConfig, info: DatasetInfo, split: Split | FileSplit) -> bool:
    """Whether DALI makes the batches; of tensors that never were files only where it is named.

    Raises:
        DataError: DALI was asked for and is not installed.
    """
    on_disk = info.name in DOWNLOADED or info.name.startswith(PREFIX)
    if loading.loader == "auto" and not (on_disk or isinstance(split, FileSplit)):
        return False
    return dali.chosen(loading.loader)


def _rows(images: Tensor, index: Tensor) -> Tensor:
    return images.index_select(0, index.to(images.device))


class _Named:
    """A feed of files whose failures name the file."""

    def __init__(self, feed: Feed, split: FileSplit, loading: LoadingConfig) -> None:
        self.feed, self.split, self.loading, self.kind = feed, split, loading, feed.kind

    def batches(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None = None,
        flip: Iterable[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """As :class:`Feed`.

        Raises:
            DataError: a file that does not decode.
        """
        asked: list[Tensor] = []

        def noted() -> Iterator[Tensor]:
            for rows in index:
                asked.append(rows)
                yield rows

        given = 0
        try:
            for made in self.feed.batches(noted(), crop, flip):
                yield made
                given += 1
        except (OSError, ValueError, SyntaxError, RuntimeError):
            decoder = make_decoder(self.loading, self.split.side, self.split.channels)
            rows = torch.cat(asked[given:]).unique().tolist()
            bad = undecodable(decoder, [self.split.paths[row] for row in rows])
            if not bad:
                raise
            raise does_not_decode(bad) from None


class Loader:
    """Every image of a split (or of one shard of it) once an epoch.

    The order of an epoch is a permutation drawn from ``(seed, epoch, dataset)``; shard ``i`` of
    ``n`` takes every n-th of it from the i-th on, so shards never overlap and differ in size by
    one image at most.  The last batch of an epoch is smaller where the size is no multiple of
    ``batch`` (``last="keep"``), or is left out (``last="drop"``).

    Attributes:
        size: images an epoch.
        kind: ``dali`` or ``torch``.
    """

    def __init__(
        self, feed: Feed, labels: Tensor, info: DatasetInfo, *, batch: int, shuffle: bool,
        pad: int, flip: float, seed: int, shard: tuple[int, int], last: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.feed, self.labels, self.info = feed, labels.to(device), info
        self.batch, self.shuffle, self.pad, self.flip = batch, shuffle, pad, flip
        self.seed, self.shard, self.last = seed, shard, last
        self.kind = feed.kind
        everything = len(range(shard[0], len(labels), shard[1]))
        self.size = everything - everything % batch if last == "drop" else everything
        if not self.size:
            raise DataError(
                f"an epoch of {info.name!r} has no batch",
                got=f"{everything} images in shard {shard[0]} of {shard[1]}, batches of {batch}",
                expected="a batch at least", fix="choose a smaller batch, or last='keep'",
            )  # fmt: skip

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.size // self.batch)

    def order(self, number: int) -> Tensor:
        """Rows of an epoch, (size,) int64."""
        rows = torch.arange(len(self.labels))
        if self.shuffle:
            rng = draws.generator(self.seed, number, self.info.name, "loader order")
            rows = torch.from_numpy(rng.permutation(len(rows)))
        return rows[self.shard[0] :: self.shard[1]][: self.size]

    def epoch(self, number: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of epoch ``number``, batch by batch."""
        index = self.order(number).split(self.batch)
        rng = draws.generator(self.seed, number, self.info.name, f"loader crops {self.shard}")
        crop = draws.crop_offsets(rng, (self.size,), self.pad).split(self.batch)
        flip = draws.flips(rng, (self.size,), self.flip).split(self.batch)
        batches = self.feed.batches(index, crop if self.pad else None, flip if self.flip else None)
        for images, rows in zip(batches, index, strict=True):
            yield images, self.labels[rows.to(self.labels.device)]


def open_loader(
    split: Split | FileSplit, info: DatasetInfo, *, batch: int, training: bool = True,
    normalise: bool = True, seed: int = 0, shard: tuple[int, int] = (0, 1),
    last: str | None = None, device: torch.device | str = "cpu",
    loading: LoadingConfig | None = None,
) -> Loader:  # fmt: skip
    """A loader over ``dataset(name).train(side)`` or any split.

    Args:
        split: images or files.
        info: its statistics, and its augmentation (``pad``, ``flip``) while training.
        batch: images a batch.
        training: shuffled, augmented, the last incomplete batch dropped.
        normalise: with the dataset's statistics, grey repeated; else in [0, 1].
        seed: of order, crops and flips.
        shard: (number from 0, count).
        last: ``keep`` or ``drop`` the incomplete batch; None: as ``training`` says.
        device: of the batches.
        loading: who makes them, and how.

    Raises:
        DataError: DALI asked for and not installed, files that do not decode, an empty epoch.
    """
    if last not in (None, "keep", "drop") or not 0 <= shard[0] < shard[1]:
        raise DataError("last batch or shard", got=f"last={last!r}, shard={shard}",
                        expected="last 'keep' or 'drop'; shard (i, n) with 0 <= i < n",
                        fix="change that argument")  # fmt: skip
    pad, flip = (info.pad, info.flip) if training else (0, 0.0)
    feed, labels = open_feed(split, info, batch=batch, pad=pad, normalise=normalise,
                             device=device, loading=loading)  # fmt: skip
    return Loader(
        feed, labels, info, batch=batch, shuffle=training, pad=pad, flip=flip, seed=seed,
        shard=shard, last=last or ("drop" if training else "keep"), device=torch.device(device),
    )  # fmt: skip
