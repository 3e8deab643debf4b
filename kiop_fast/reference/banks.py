"""Upstream's stores: one PNG an image in a folder, and features in host memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORKERS = 4  # processes that read PNGs back, as upstream


def quantise(images: Tensor) -> Tensor:
    """[0, 1] → uint8 as upstream's PNG writer: clamp, times 255, truncate."""
    scaled = images.detach().clamp(0, 1).cpu().numpy() * 255
    return torch.from_numpy(scaled.astype("uint8"))


class ImageBank:
    """All synthetic images of a task as PNG files, in the order they were made.

    Files are numbered from 0 and only those this bank wrote are read, so a folder left behind by
    an earlier run is overwritten and never mixed in.

    Args:
        channels: 1 for grey PNGs, else 3.
        side: of an image, pixels.
        device: where ``images`` puts what it reads.
        folder: where the PNGs go; None for a temporary one that goes with the bank.
        workers: processes of the loader; 0 reads in this one.

    Attributes:
        targets: (M,) int64, the class each image was made for.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        device: torch.device,
        folder: Path | str | None = None,
        workers: int = WORKERS,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(folder if self._temporary is None else self._temporary.name)  # type: ignore[arg-type]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.channels, self.side, self.device, self.workers = channels, side, device, workers
        self.targets = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def files(self) -> list[Path]:
        """The PNG of every image, in order."""
        return [self.folder / f"{row:06d}.png" for row in range(len(self))]

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Write ``images`` (N, C, s, s) uint8 and keep their ``targets`` (N,)."""
        for row, image in enumerate(images.cpu(), start=len(self)):
            to_pil(image).save(self.folder / f"{row:06d}.png")
        self.targets = torch.cat([self.targets, targets.cpu()])

    @property
    def images(self) -> Tensor:
        """(M, C, s, s) uint8, every PNG read back."""
        if not len(self):
            shape = (0, self.channels, self.side, self.side)
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        return torch.stack([from_pil(Image.open(file)) for file in self.files]).to(self.device)

    def spread(self, most: int) -> Tensor:
        """At most so many of the images, evenly spaced."""
        return self.images[:: -(-len(self) // most)]


def to_pil(image: Tensor) -> Image.Image:
    """(C, s, s) uint8 on the host → a grey or RGB picture."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def from_pil(picture: Image.Image) -> Tensor:
    """A grey or RGB picture → (C, s, s) uint8."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class FeatureBank:
    """A ring of the newest feature pairs ``[local; global]`` in host memory, gathered a step.

    Without upstream's two faults: exactly full it works, and any batch fits any capacity.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.rows = torch.zeros(capacity, 2 * width)
        self.added = 0

    @property
    def stored(self) -> int:
        """Rows that hold features."""
        return min(self.added, len(self.rows))

    def add(self, features: Tensor) -> None:
        """Write (N, 2 width) over the oldest rows, one after another."""
        for row in features.to(self.rows):
            self.rows[self.added % len(self.rows)] = row
            self.added += 1

    def pairs(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Local and global features on the host, each (n, width): all rows, or those named."""
        chosen = torch.arange(self.stored) if index is None else index.cpu()
        local, global_ = self.rows[chosen].chunk(2, dim=1)
        return local, global_
