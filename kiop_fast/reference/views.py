"""The two differentiable random views, one image at a time, as kornia makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def global_view(images: Tensor, corners: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Zero-pad by ``pad``, crop back to s×s at ``corners`` (N, 2) top, left; flip where told."""
    side = images.shape[-1]
    padded = F.pad(images, (pad, pad, pad, pad)).unbind(0)
    crops = [
        image[:, top : top + side, left : left + side]
        for image, (top, left) in zip(padded, corners.tolist(), strict=True)
    ]
    return _flip(torch.stack(crops), flips)


def local_view(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Crop ``boxes`` (N, 4) top, left, height, width; resize each to s×s; flip where told.

    Bilinear with aligned corners and no antialiasing, one ``interpolate`` an image.
    """
    side = images.shape[-1]
    crops = []
    for image, (top, left, height, width) in zip(images.unbind(0), boxes.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        if (height, width) != (side, side):
            crop = F.interpolate(crop, size=(side, side), mode="bilinear", align_corners=True)
        crops.append(crop)
    return _flip(torch.cat(crops), flips)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, C, s, s) in [0, 1] → (N, 3, s, s); a single channel is repeated."""
    centre = torch.as_tensor(mean, dtype=images.dtype, device=images.device)
    scale = torch.as_tensor(std, dtype=images.dtype, device=images.device)
    return (images - centre[None, :, None, None]) / scale[None, :, None, None]


def _flip(images: Tensor, flips: Tensor) -> Tensor:
    rows = flips.nonzero().flatten().to(images.device)
    return images.index_put((rows,), images[rows].flip(3))
