"""The Triton kernels of views; the math is in ``views.py``.

Forward: one kernel for both views, four taps a pixel (a global view's crop is a resize by 1).
Backward: one kernel; the crop's adjoint is a crop, the resize's is Ryᵀ · G · Rx on tiles, so every
image pixel gathers and nothing is scattered: no atomics, one order of every sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.crop import empty_images
from kiop_fast.kernels.dispatch import tl, triton

# Not measured on a GPU yet.  One tile of 32 covers images of 17 to 32 pixels; where several tiles
# are needed, or three pipeline stages, ptxas reports spills for 32 and none for 16.
FWD_BLOCK = 512
ONE_TILE, SMALL_TILE = 32, 16
NUM_WARPS, BWD_STAGES = 4, 1


@dispatch.jit
def _place(o, start, step, SIDE: tl.constexpr):
    """Output pixels o of one axis → first tap, second tap's weight, which taps are on the image."""
    place = o.to(tl.float32) * step
    whole = tl.floor(place)
    weight = place - whole
    tap = start + whole.to(tl.int32)
    m_first = (tap >= 0) & (tap < SIDE)
    m_second = (tap >= -1) & (tap < SIDE - 1) & (weight > 0)
    return tap, weight, m_first, m_second


@dispatch.jit
def _views_fwd_kernel(
    images_ptr,  # (N, C, s, s), any strides
    crop_ptr,  # (N, 2)
    crop_flip_ptr,  # (N,)
    box_ptr,  # (N, 4)
    box_flip_ptr,  # (N,)
    mean_ptr,  # (Cout,)
    std_ptr,  # (Cout,)
    views_ptr,  # (2N, Cout, s, s), contiguous or channels-last
    n_images,
    pad,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK neighbouring elements of one view in memory order."""
    view = tl.program_id(0)
    local = view >= n_images
    n = tl.where(local, view - n_images, view).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < CHANNELS_OUT * SIDE * SIDE
    if CHANNELS_LAST:
        c = o % CHANNELS_OUT
        pixel = o // CHANNELS_OUT
    else:
        c = o // (SIDE * SIDE)
        pixel = o % (SIDE * SIDE)
    crop_top = tl.load(crop_ptr + n * 2).to(tl.int32) - pad
    crop_left = tl.load(crop_ptr + n * 2 + 1).to(tl.int32) - pad
    box_top = tl.load(box_ptr + n * 4).to(tl.int32)
    box_left = tl.load(box_ptr + n * 4 + 1).to(tl.int32)
    height = tl.load(box_ptr + n * 4 + 2).to(tl.float32)
    width = tl.load(box_ptr + n * 4 + 3).to(tl.float32)
    crop_flip = tl.load(crop_flip_ptr + n).to(tl.int32)
    box_flip = tl.load(box_flip_ptr + n).to(tl.int32)
    last = tl.full((), max(SIDE - 1, 1), tl.float32)
    step_y = tl.where(local, tl.div_rn(height - 1, last), 1.0)
    step_x = tl.where(local, tl.div_rn(width - 1, last), 1.0)
    y = pixel // SIDE
    x = pixel % SIDE
    x = tl.where(tl.where(local, box_flip, crop_flip) != 0, SIDE - 1 - x, x)
    y, b_down, m_top, m_bottom = _place(y, tl.where(local, box_top, crop_top), step_y, SIDE)
    x, b_right, m_left, m_right = _place(x, tl.where(local, box_left, crop_left), step_x, SIDE)
    at = images_ptr + n * stride_n + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    if CHANNELS > 1:
        at += c.to(tl.int64) * stride_c
    b_00 = tl.load(at, mask=m & m_top & m_left, other=0.0).to(tl.float32)
    b_01 = tl.load(at + stride_x, mask=m & m_top & m_right, other=0.0).to(tl.float32)
    b_10 = tl.load(at + stride_y, mask=m & m_bottom & m_left, other=0.0).to(tl.float32)
    b_11 = tl.load(at + stride_y + stride_x, mask=m & m_bottom & m_right, other=0.0).to(tl.float32)
    b_top = b_00 * (1 - b_right) + b_01 * b_right
    b_bottom = b_10 * (1 - b_right) + b_11 * b_right
    b_view = b_top * (1 - b_down) + b_bottom * b_down
    b_mean = tl.load(mean_ptr + c, mask=m, other=0.0).to(tl.float32)
    b_std = tl.load(std_ptr + c, mask=m, other=1.0).to(tl.float32)
    b_view = tl.div_rn(b_view - b_mean, b_std)
    at = views_ptr + view.to(tl.int64) * (CHANNELS_OUT * SIDE * SIDE) + o
    tl.store(at, b_view.to(views_ptr.dtype.element_ty), mask=m)


@dispatch.jit
def _summed(at, c, m, std_ptr, stride_c, REPEATS: tl.constexpr):
    """The gradient at ``at`` over std, summed over the copies of a repeated grey channel."""
    b_sum = tl.zeros(m.shape, tl.float32)
    for copy in tl.static_range(REPEATS):
        std = tl.load(std_ptr + c + copy).to(tl.float32)
        b_sum += tl.load(at + (c + copy) * stride_c, mask=m, other=0.0).to(tl.float32) / std
    return b_sum


@dispatch.jit
def _tents(o_image, o_view, start, step, flip, SIDE: tl.constexpr):
    """Weight of image pixels o_image in view pixels o_view: T of the docstring."""
    shown = tl.where(flip != 0, SIDE - 1 - o_view, o_view).to(tl.float32)
    b_tent = 1 - tl.abs(shown * step - (o_image - start).to(tl.float32))
    return tl.where((o_view < SIDE) & (o_image < SIDE), tl.maximum(b_tent, 0.0), 0.0)


@dispatch.jit
def _views_bwd_kernel(
    grad_ptr,  # (2N, Cout, s, s), any strides
    crop_ptr,  # (N, 2)
    crop_flip_ptr,  # (N,)
    box_ptr,  # (N, 4)
    box_flip_ptr,  # (N,)
    std_ptr,  # (Cout,)
    grad_images_ptr,  # (N, C, s, s)
    n_images,
    pad,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE × TILE pixels of one channel of one image's gradient."""
    n = (tl.program_id(0) // CHANNELS).to(tl.int64)
    c = (tl.program_id(0) % CHANNELS).to(tl.int64)
    tiles: tl.constexpr = (SIDE + TILE - 1) // TILE
    repeats: tl.constexpr = CHANNELS_OUT // CHANNELS
    y = (tl.program_id(1) // tiles) * TILE + tl.arange(0, TILE)[:, None]
    x = (tl.program_id(1) % tiles) * TILE + tl.arange(0, TILE)[None, :]
    m_image = (y < SIDE) & (x < SIDE)

    v_y = y + pad - tl.load(crop_ptr + n * 2).to(tl.int32)
    v_x = x + pad - tl.load(crop_ptr + n * 2 + 1).to(tl.int32)
    v_x = tl.where(tl.load(crop_flip_ptr + n).to(tl.int32) != 0, SIDE - 1 - v_x, v_x)
    m_view = m_image & (v_y >= 0) & (v_y < SIDE) & (v_x >= 0) & (v_x < SIDE)
    at = grad_ptr + n * stride_n + v_y.to(tl.int64) * stride_y + v_x.to(tl.int64) * stride_x
    b_grad = _summed(at, c, m_view, std_ptr, stride_c, repeats)

    top = tl.load(box_ptr + n * 4).to(tl.int32)
    left = tl.load(box_ptr + n * 4 + 1).to(tl.int32)
    last = tl.full((), max(SIDE - 1, 1), tl.float32)
    step_y = tl.div_rn(tl.load(box_ptr + n * 4 + 2).to(tl.float32) - 1, last)
    step_x = tl.div_rn(tl.load(box_ptr + n * 4 + 3).to(tl.float32) - 1, last)
    flip = tl.load(box_flip_ptr + n).to(tl.int32)
    for first_x in range(0, SIDE, TILE):
        o_x = first_x + tl.arange(0, TILE)
        b_rows = tl.zeros((TILE, TILE), tl.float32)
        for first_y in range(0, SIDE, TILE):
            o_y = first_y + tl.arange(0, TILE)
            at = grad_ptr + (n + n_images) * stride_n
            at += o_y.to(tl.int64)[:, None] * stride_y + o_x.to(tl.int64)[None, :] * stride_x
            m_view = (o_y < SIDE)[:, None] & (o_x < SIDE)[None, :]
            b_view = _summed(at, c, m_view, std_ptr, stride_c, repeats)
            b_ry = _tents(y, o_y[None, :], top, step_y, 0, SIDE)
            b_rows = tl.dot(b_ry, b_view, b_rows, input_precision="ieee")
        b_rx = _tents(x, o_x[:, None], left, step_x, flip, SIDE)
        b_grad = tl.dot(b_rows, b_rx, b_grad, input_precision="ieee")
    at = grad_images_ptr + ((n * CHANNELS + c) * SIDE + y) * SIDE + x
    tl.store(at, b_grad.to(grad_images_ptr.dtype.element_ty), mask=m_image)


def launch_fwd(
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
    """(2N, Cout, s, s) of ``dtype``."""
    count, channels, side, _ = images.shape
    views = empty_images(images, 2 * count, len(mean), dtype, channels_last)
    tables = (crop, crop_flip, box, box_flip, mean, std)
    dispatch.launch(
        _views_fwd_kernel,
        (2 * count, triton.cdiv(len(mean) * side * side, FWD_BLOCK)),
        images,
        *(table.contiguous() for table in tables),
        views,
        count,
        pad,
        *images.stride(),
        SIDE=side,
        CHANNELS=channels,
        CHANNELS_OUT=len(mean),
        CHANNELS_LAST=channels_last,
        BLOCK=FWD_BLOCK,
        num_warps=NUM_WARPS,
    )
    return views


def launch_bwd(
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
    """(N, C, s, s) of ``dtype``, contiguous."""
    count, side = len(crop), grad.shape[-1]
    grad_images = empty_images(grad, count, channels, dtype, False)
    tile = ONE_TILE if SMALL_TILE < side <= ONE_TILE else SMALL_TILE
    dispatch.launch(
        _views_bwd_kernel,
        (count * channels, triton.cdiv(side, tile) ** 2),
        grad,
        *(table.contiguous() for table in (crop, crop_flip, box, box_flip, std)),
        grad_images,
        count,
        pad,
        *grad.stride(),
        SIDE=side,
        CHANNELS=channels,
        CHANNELS_OUT=len(std),
        TILE=tile,
        num_warps=NUM_WARPS,
        num_stages=BWD_STAGES,
    )
    return grad_images
