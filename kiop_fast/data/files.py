"""Splits that are image files: paths and labels now, pixels when somebody asks for them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kiop_fast.config import LoadingConfig
from kiop_fast.data import dali
from kiop_fast.data.pictures import PictureDecoder
from kiop_fast.data.spec import Split
from kiop_fast.errors import DataError

_BATCH = 128  # files decoded at once while a split is read whole
_NAMED = 5  # files named in one message


class FileBank:
    """Real image files where a bank of images is expected: nothing is kept in memory.

    Args:
        split: the files, all of which decode.
        loading: who decodes them.
    """

    def __init__(self, split: FileSplit, loading: LoadingConfig) -> None:
        self.split, self.loading = split, loading

    def __len__(self) -> int:
        return len(self.split)

    @property
    def images(self) -> Tensor:
        """(M, C, s, s) uint8: the whole split, decoded into memory."""
        return self.split.decoded(self.loading).images

    def spread(self, most: int) -> Tensor:
        """At most so many of the images, evenly spaced, (m, C, s, s) uint8."""
        rows = torch.arange(0, len(self), -(-len(self) // most))
        return self.split.rows(rows, self.loading).images


class Decoder(Protocol):
    """Files to pixels; usable again after a failure."""

    def decode(self, batches: Sequence[Sequence[Path]]) -> Iterator[Tensor]:
        """(n, C, s, s) uint8 a batch of files."""


@dataclass(frozen=True, eq=False)
class FileSplit:
    """A split kept as image files of any size, resized to ``side`` when read.

    Attributes:
        paths: one a picture.
        labels: (N,) int64.
        side: of the images, pixels; a picture of another shape is stretched.
        channels: 1 or 3.
        whole: every file is known to decode.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    side: int
    channels: int
    whole: bool = False
    _kept: dict[tuple[LoadingConfig, str], Split] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise DataError("files and labels do not fit together",
                            got=f"{len(self.paths)} files, {len(self.labels)} labels",
                            expected="one label a file")  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def size(self) -> int:
        """Bytes of all images decoded."""
        return len(self) * self.channels * self.side**2

    @property
    def images(self) -> Tensor:
        """(N, C, s, s) uint8, decoded once; a file that does not decode is an error."""
        return self.decoded(LoadingConfig()).images

    def decoded(self, loading: LoadingConfig, device: torch.device | str = "cpu") -> Split:
        """The whole split in host memory, decoded once a setting.

        Args:
            device: a GPU here lets DALI decode on it.

        Raises:
            DataError: files that do not decode (unless they are to be skipped), by name.
        """
        key = (loading, str(device))
        if key not in self._kept:
            decoder = make_decoder(loading, self.side, self.channels, device)
            parts, bad = _decode_all(decoder, self._chunks())
            kept = self._without(bad, loading)
            self._kept[key] = Split(torch.cat(parts), kept.labels)
        return self._kept[key]

    def checked(self, loading: LoadingConfig) -> FileSplit:
        """The split itself, or (to skip) without the files that do not decode: one whole pass."""
        if loading.undecodable != "skip" or self.whole:
            return self
        decoder = make_decoder(loading, self.side, self.channels)
        bad = [path for chunk in self._chunks() for path in undecodable(decoder, chunk)]
        return replace(self._without(bad, loading), whole=True, _kept={})

    def _chunks(self) -> list[tuple[Path, ...]]:
        return [self.paths[i : i + _BATCH] for i in range(0, len(self), _BATCH)]

    def rows(self, index: Tensor, loading: LoadingConfig) -> Split:
        """Some images, decoded now and not kept."""
        rows = index.tolist()
        chosen = FileSplit(
            tuple(self.paths[row] for row in rows), self.labels[index], self.side, self.channels
        )
        return chosen.decoded(loading)

    def _without(self, bad: Sequence[Path], loading: LoadingConfig) -> FileSplit:
        if not bad:
            return self
        if loading.undecodable != "skip":
            raise does_not_decode(bad)
        gone = set(bad)
        rows = [i for i, path in enumerate(self.paths) if path not in gone]
        if not rows:
            raise does_not_decode(bad)
        warnings.warn(f"skipped {len(bad)} image files that do not decode: {_named(bad)}",
                      stacklevel=3)  # fmt: skip
        kept = tuple(self.paths[i] for i in rows)
        return replace(self, paths=kept, labels=self.labels[rows], _kept={})


def make_decoder(
    loading: LoadingConfig, side: int, channels: int, device: torch.device | str = "cpu"
) -> Decoder:
    """DALI's or Pillow's decoder, as the setting says (auto: DALI where it is installed)."""
    threads = decoding_threads(loading)
    if dali.chosen(loading.loader):
        gpu = dali.gpu_index(device)
        return dali.DaliDecoder(side, channels, _BATCH, device_id=gpu, threads=threads)
    return PictureDecoder(side, channels, threads)


def decoding_threads(loading: LoadingConfig) -> int:
    """The setting, or one a core, at most eight."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return loading.threads or min(8, cores)


def _decode_all(
    decoder: Decoder, chunks: Sequence[Sequence[Path]]
) -> tuple[list[Tensor], list[Path]]:
    """Every chunk's pixels without its undecodable files, and those files."""
    parts: list[Tensor] = []
    bad: list[Path] = []
    while len(parts) < len(chunks):
        try:
            for part in decoder.decode(chunks[len(parts) :]):
                parts.append(part)
        except _FAILURES:
            chunk = chunks[len(parts)]
            broken = undecodable(decoder, chunk)
            if not broken:
                raise
            bad += broken
            good = [path for path in chunk if path not in set(broken)]
            parts += decoder.decode([good]) if good else [torch.empty(0)]
    return [part for part in parts if len(part)], bad


_FAILURES = (OSError, ValueError, SyntaxError, RuntimeError)  # of Pillow and of DALI


def undecodable(decoder: Decoder, paths: Sequence[Path]) -> list[Path]:
    """Those of ``paths`` that do not decode, found by halving."""
    try:
        for _ in decoder.decode([paths]):
            pass
        return []
    except _FAILURES:
        if len(paths) == 1:
            return list(paths)
    half = len(paths) // 2
    return undecodable(decoder, paths[:half]) + undecodable(decoder, paths[half:])


def does_not_decode(bad: Sequence[Path]) -> DataError:
    """The error that names the files."""
    return DataError(
        f"{len(bad)} image file{'s do' if len(bad) > 1 else ' does'} not decode",
        got=_named(bad), expected="whole JPEG, PNG, PPM, BMP, WebP or TIFF files",
        fix="mend or remove them, or leave them out: loading.undecodable=skip",
    )  # fmt: skip


def _named(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(str(path) for path in paths[:_NAMED]) + more
