"""Bring images to the side of a run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 4096  # images in floating point at once


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear (antialiased when shrinking, as PIL does) to (N, C, side, side) uint8."""
    if images.shape[-2:] == (side, side):
        return images
    parts = []
    for part in images.split(_CHUNK):
        made = F.interpolate(part.float(), size=(side, side), mode="bilinear", antialias=True)
        parts.append(made.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)
