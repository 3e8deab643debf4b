"""Batches without DALI: bytes are gathered, cropped and mirrored by torch, files read by Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.data.dali import Normaliser
from kiop_fast.data.pictures import PictureDecoder


class TorchFeed:
    """The same batches as :class:`kiop_fast.data.dali.DaliFeed`, and the same arguments."""

    kind = "torch"

    def __init__(
        self, gather: Callable[[Tensor], Tensor] | Sequence[Path], *, side: int, channels: int,
        pad: int = 0, normaliser: Normaliser | None, device: torch.device, threads: int = 1,
    ) -> None:  # fmt: skip
        self.gather, self.pad, self.device = gather, pad, device
        self.decoder = PictureDecoder(side, channels, threads)
        dtype = torch.get_default_dtype()
        self.normaliser = None
        if normaliser is not None:
            mean, std = (torch.tensor(v, dtype=dtype, device=device) for v in normaliser)
            self.normaliser = mean.view(3, 1, 1), std.view(3, 1, 1)

    def batches(
        self, index: Iterable[Tensor], crop: Iterable[Tensor] | None = None,
        flip: Iterable[Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """A batch for every row table; see :class:`kiop_fast.data.loader.Feed`."""
        crops = None if crop is None else iter(crop)
        flips = None if flip is None else iter(flip)
        for images in self._gathered(index):
            images = images.to(self.device)
            if self.pad and crops is not None:
                images = _crop(images, next(crops).to(self.device), self.pad)
            if flips is not None:
                mirror = next(flips).to(self.device)[:, None, None, None]
                images = torch.where(mirror, images.flip(-1), images)
            images = images.to(torch.get_default_dtype()) / 255
            if self.normaliser is not None:
                images = (images - self.normaliser[0]) / self.normaliser[1]
            yield images

    def _gathered(self, index: Iterable[Tensor]) -> Iterator[Tensor]:
        if callable(self.gather):
            for rows in index:
                yield self.gather(rows)
            return
        paths = self.gather
        yield from self.decoder.decode([[paths[row] for row in rows.tolist()] for rows in index])


def _crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Crops of the own size from images framed by ``pad`` zeros; offsets (N, 2) top and left."""
    side = images.shape[-1]
    framed = F.pad(images, (pad, pad, pad, pad))
    span = torch.arange(side, device=images.device)
    row = (offsets[:, 0, None] + span)[:, None, :, None]
    column = (offsets[:, 1, None] + span)[:, None, None, :]
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return framed[image, channel, row, column]
