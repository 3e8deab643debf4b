"""views: images → two views of each, cropped, resized, flipped and normalised in one pass.

The views of contrastive model inversion (SPEC section 4.3), from boxes and flips drawn elsewhere.
For image n, channel c, output pixel (y, x), with x' = s - 1 - x where flipped, else x:

    global[n,c,y,x] = P[n, c, top + y, left + x'],       P = the image in a black frame of ``pad``
    local[n,c,y,x]  = Σ_ij T(top + r_h y - i) T(left + r_w x' - j) X[n,c,i,j]
    T(t) = max(0, 1 - |t|),  r_h = (height - 1)/(s - 1),  r_w = (width - 1)/(s - 1)
    result          = (view - mean_c)/std_c; black padding is black before this

The local view is kornia 0.9's RandomResizedCrop in slice mode (crop, then resize to s × s):
bilinear with align_corners=True and no antialias, as torch.nn.functional.interpolate does it.
Both views are Ry · X · Rxᵀ with one matrix row a pixel (one-hot rows for the global view), so
with the cotangent G:  dX = Σ_views Ryᵀ · (G / std) · Rx.

    images (N, C, s, s);  crop (N, 2);  box (N, 4);  flips (N,);  result (2N, Cout, s, s)
    bytes  forward reads the images twice and writes 2N · Cout · s²; backward the reverse
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.crop import (
    check_crop,
    check_dtype,
    check_normaliser,
    check_table,
    crop_window,
    empty_images,
    flipped_columns,
    require_rows,
    stored,
    unsupported_result,
)
from kiop_fast.kernels.views_triton import launch_bwd, launch_fwd


def views_eager(
    images: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    *,
    pad: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """The same in plain torch, whole batches at a time.

    Local views are two batched matmuls, global views one gather.  ``set_float32_matmul_precision``
    applies to the matmuls.  Forward + backward on one core, 64 to 200 images of 16 × 16 to
    3 × 32 × 32: 1.1 to 16 ms.  In its time: a gradient written out 1.0, matmuls for both views 0.9
    to 1.3, ``grid_sample`` 1.1 to 1.9, four-tap gathers 1.2 to 1.9, a loop of ``interpolate`` 5
    to 25.
    """
    out_dtype = images.dtype if dtype is None else dtype
    images = images.to(dispatch.accumulation_dtype(images))
    side = images.shape[-1]
    rows = crop[:, :1] + torch.arange(side, device=crop.device)
    wide = crop_window(images, rows, crop[:, 1:] + flipped_columns(side, crop_flip), pad)
    by_row, by_column = _matrices(box, box_flip, side, images.dtype)
    narrow = torch.bmm(images.flatten(1, 2), by_column.mT).view(images.shape)
    both = torch.cat([wide, torch.matmul(by_row[:, None], narrow)])
    if len(std) != both.shape[1]:
        both = both.repeat(1, len(std), 1, 1)
    scale = 1 / std.to(both.dtype)[:, None, None]
    both = both.mul_(scale).sub_(mean.to(both.dtype)[:, None, None] * scale)
    return stored(both, out_dtype, channels_last)


def _matrices(box: Tensor, flip: Tensor, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """box (N, 4), flip (N,) → Ry and Rx (N, s, s): T at view pixel × image pixel."""
    pixels = torch.arange(side, device=box.device)
    step = (box[:, 2:] - 1).to(dtype) / max(side - 1, 1)
    places = torch.stack([pixels.expand(len(flip), -1), flipped_columns(side, flip)], dim=1)
    places = places.to(dtype) * step[:, :, None]
    inside = (pixels - box[:, :2, None]).to(dtype)
    distance = (places[..., :, None] - inside[..., None, :]).abs_()
    by_row, by_column = distance.neg_().add_(1).clamp_(min=0).unbind(1)
    return by_row, by_column


def _backward_eager(
    grad: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    std: Tensor,
    pad: int,
    channels: int,
) -> Tensor:
    """grad (2N, Cout, s, s) → (N, C, s, s): the operator's backward where no kernel runs."""
    acc = dispatch.accumulation_dtype(grad)
    grad = grad.to(acc) / std.to(acc)[:, None, None]
    if grad.shape[1] != channels:
        grad = grad.sum(1, keepdim=True)
    wide, narrow = grad.chunk(2)
    side = grad.shape[-1]
    # Image column j was shown at x' = j + pad - left: the adjoint of a crop is the crop back.
    pixels = torch.arange(side, device=crop.device) + 2 * pad
    columns = pixels - crop[:, 1:]
    columns = torch.where(crop_flip[:, None], side - 1 + 2 * pad - columns, columns)
    wide = crop_window(wide, pixels - crop[:, :1], columns, pad)
    by_row, by_column = _matrices(box, box_flip, side, acc)
    narrow = torch.bmm(narrow.flatten(1, 2), by_column).view(wide.shape)
    return wide + torch.matmul(by_row.mT[:, None], narrow)


@torch.library.custom_op("kiop_fast::views", mutates_args=())
def _views(
    images: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    pad: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if dispatch.use_triton("views", images, mean, std):
        tables = (crop, crop_flip, box, box_flip)
        return launch_fwd(images, *tables, pad, mean, std, dtype, channels_last)
    return views_eager(
        images, crop, crop_flip, box, box_flip,
        pad=pad, mean=mean, std=std, dtype=dtype, channels_last=channels_last,
    )  # fmt: skip


@_views.register_fake
def _(images, crop, crop_flip, box, box_flip, pad, mean, std, dtype, channels_last):  # type: ignore[no-untyped-def]
    return empty_images(images, 2 * images.shape[0], mean.shape[0], dtype, channels_last)


@torch.library.custom_op("kiop_fast::views_backward", mutates_args=())
def _views_backward(
    grad: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    std: Tensor,
    pad: int,
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    if dispatch.use_triton("views", grad, std):
        return launch_bwd(grad, crop, crop_flip, box, box_flip, std, pad, channels, dtype)
    result = _backward_eager(grad, crop, crop_flip, box, box_flip, std, pad, channels)
    return stored(result, dtype, False)


@_views_backward.register_fake
def _(grad, crop, crop_flip, box, box_flip, std, pad, channels, dtype):  # type: ignore[no-untyped-def]
    return empty_images(grad, crop.shape[0], channels, dtype, False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, crop, crop_flip, box, box_flip, pad, _, std, _, _ = inputs
    ctx.save_for_backward(crop, crop_flip, box, box_flip, std)
    ctx.pad, ctx.channels, ctx.dtype = pad, images.shape[1], images.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = _views_backward(grad, *ctx.saved_tensors, ctx.pad, ctx.channels, ctx.dtype)
    return grad, *[None] * 9


_views.register_autograd(_backward, setup_context=_setup_context)


def views(
    images: Tensor,
    crop: Tensor,
    crop_flip: Tensor,
    box: Tensor,
    box_flip: Tensor,
    *,
    pad: int,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Makes the global and the local view of every image (SPEC section 4.3; kornia's geometry).

    Args:
        images: (N, C, s, s) in [0, 1]; gradients flow into them.
        crop: (N, 2) integers, top and left of the global view in the frame, 0 to 2 · pad, pixels.
        crop_flip: (N,) bool, mirror the global view left to right.
        box: (N, 4) integers, top, left, height and width of the local view's box, pixels.
        box_flip: (N,) bool, mirror the local view.
        pad: width of the black frame, pixels.
        mean: (Cout,) of the normaliser.  A tensor on the images' device costs no copy; inside a
            CUDA graph capture it has to be one.
        std: (Cout,).
        dtype: of the result; the images' by default.
        channels_last: store the result channels-last.

    Returns:
        (2N, Cout, s, s): the N global views, then the N local views.  Cout is C, or 3 for C = 1
        with a three-channel normaliser (grey repeated).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit; on the CPU also crops and boxes
            that leave the image (on a GPU, looking would wait for it).
    """
    mean, std = check_normaliser("views", images, mean, std)
    dispatch.require_floating("views", images=images)
    count, side = len(images), images.shape[-1]
    check_crop("views", images, crop, count, pad)
    check_table("views", images, "crop_flip", crop_flip, (count,), "bool")
    check_table("views", images, "box", box, (count, 4), "integer")
    check_table("views", images, "box_flip", box_flip, (count,), "bool")
    if dispatch.on_host(box):
        start, size = box[:, :2], box[:, 2:]
        inside = (start >= 0) & (size >= 1) & (start + size <= side)
        expected = f"top, left, height, width of a box inside {side} × {side}"
        require_rows("views", "box", box, inside.all(1), expected)
    check_dtype("views", dtype)
    tables = (crop, crop_flip, box, box_flip)
    dtype = images.dtype if dtype is None else dtype
    if dispatch.use_triton("views", images, mean, std, unsupported=unsupported_result(dtype)):
        return _views(images, *tables, pad, mean, std, dtype, channels_last)
    return views_eager(
        images, *tables, pad=pad, mean=mean, std=std, dtype=dtype, channels_last=channels_last
    )
