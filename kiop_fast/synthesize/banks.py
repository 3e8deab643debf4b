"""Where synthetic images and their features wait: two banks on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """[0, 1] → uint8 by truncation, ``uint8(255 x)``: what a PNG round trip upstream does."""
    return (images.clamp(0, 1) * 255).to(torch.uint8)


class ImageBank:
    """All synthetic images of a task, uint8, in the order they were made.

    Args:
        capacity: images that fit without moving the buffer, which a captured step reads.

    Attributes:
        buffer: (≥ M, C, s, s) uint8; rows from M on are not yet written.
        targets: (M,) int64, the class each image was made for.
    """

    def __init__(self, channels: int, side: int, device: torch.device, capacity: int = 0) -> None:
        shape = (capacity, channels, side, side)
        self.buffer = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.targets = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def images(self) -> Tensor:
        """(M, C, s, s) uint8, a view."""
        return self.buffer[: len(self)]

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Append ``images`` (N, C, s, s) uint8 and their ``targets`` (N,)."""
        filled = len(self)
        missing = filled + len(images) - len(self.buffer)
        if missing > 0:
            more = self.buffer.new_zeros(missing, *self.buffer.shape[1:])
            self.buffer = torch.cat([self.buffer, more])
        self.buffer[filled : filled + len(images)] = images.to(self.buffer.device)
        self.targets = torch.cat([self.targets, targets.cpu()])

    def spread(self, most: int) -> Tensor:
        """At most so many of the images, evenly spaced."""
        return self.images[:: -(-len(self) // most)]


class FeatureBank:
    """A ring of the newest feature pairs, rows ``[local; global]`` (SPEC section 4, steps 5-6).

    Upstream's ring has two faults that this one lacks: exactly full it samples nothing, and the
    batch must divide its capacity.

    Args:
        capacity: rows kept.
        width: of one feature; a row is twice as wide.
        dtype: what the rows are used as; they are rounded once, when they are written.
        room: rows in front of those kept, where a step puts its batch.

    Attributes:
        buffer: (room + capacity, 2 width).
        count: rows stored, 0-d on the device; None unless a padded window was asked for.
    """

    def __init__(
        self, capacity: int, width: int, device: torch.device, dtype: torch.dtype | None = None,
        room: int = 0,
    ) -> None:  # fmt: skip
        self.buffer = torch.zeros(room + capacity, 2 * width, device=device, dtype=dtype)
        self._room = room
        self.count: Tensor | None = None
        self.added = 0

    @property
    def rows(self) -> Tensor:
        """(capacity, 2 width)."""
        return self.buffer[self._room :]

    @property
    def stored(self) -> int:
        """Rows that hold features."""
        return min(self.added, len(self.rows))

    def add(self, features: Tensor) -> None:
        """Write (N, 2 width) over the oldest rows."""
        rows = torch.arange(len(features), device=self.rows.device)
        position = (self.added + rows) % len(self.rows)
        newest = min(len(features), len(self.rows))
        self.rows[position[-newest:]] = features[-newest:].to(self.rows)
        self.added += len(features)

    def window(self, *, padded: bool) -> int:
        """Leading rows that a step reads: those stored, or ``padded`` to a power of two.

        A padded window holds for many sizes of the bank, as a captured step wants it; ``count``
        then tells on the device how many of its rows are stored.
        """
        if not padded:
            self.count = None
            return self.stored
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.int64, device=self.rows.device)
        self.count.fill_(self.stored)
        power = 1 << (self.stored - 1).bit_length() if self.stored else 0
        return min(power, len(self.rows))

    def beside(self, rows: Tensor | int) -> tuple[Tensor, Tensor]:
        """Local and global features, each (room + n, width): room for a batch, then rows.

        Args:
            rows: numbers of the rows, which are gathered; or how many of the first.
        """
        if isinstance(rows, int):
            seen = self.buffer[: self._room + rows]
        else:
            seen = self.buffer.new_empty(self._room + len(rows), self.buffer.shape[1])
            torch.index_select(self.rows, 0, rows, out=seen[self._room :])
        local, global_ = seen.chunk(2, dim=1)
        return local, global_
