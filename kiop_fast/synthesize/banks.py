"""Where synthetic images and their features wait: two banks on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """[0, 1] → uint8 by truncation, ``uint8(255 x)``: what a PNG round trip upstream does."""
    return (images.clamp(0, 1) * 255).to(torch.uint8)


class ImageBank:
    """All synthetic images of a task, uint8, in the order they were made.

    Attributes:
        images: (M, C, s, s) uint8.
        targets: (M,) int64, the class each image was made for.
    """

    def __init__(self, channels: int, side: int, device: torch.device) -> None:
        self.images = torch.empty(0, channels, side, side, dtype=torch.uint8, device=device)
        self.targets = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Append ``images`` (N, C, s, s) uint8 and their ``targets`` (N,)."""
        self.images = torch.cat([self.images, images.to(self.images.device)])
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
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, 2 * width, device=device)
        self.added = 0

    @property
    def stored(self) -> int:
        """Rows that hold features."""
        return min(self.added, len(self.rows))

    def add(self, features: Tensor) -> None:
        """Write (N, 2 width) over the oldest rows."""
        position = (self.added + torch.arange(len(features))) % len(self.rows)
        newest = min(len(features), len(self.rows))
        self.rows[position[-newest:].to(self.rows.device)] = features[-newest:].to(self.rows)
        self.added += len(features)

    def pairs(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Local and global features, each (n, width): all stored rows, or those at ``index``."""
        rows = self.rows[: self.stored] if index is None else self.rows[index]
        local, global_ = rows.chunk(2, dim=1)
        return local, global_
