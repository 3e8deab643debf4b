"""The Triton kernel of bank_replay; the math is in ``bank_replay.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.crop import empty_images
from kiop_fast.kernels.dispatch import tl, triton

# Not measured on a GPU yet.
BLOCK, NUM_WARPS = 1024, 4


@dispatch.jit
def _bank_replay_kernel(
    bank_ptr,  # (M, C, s, s) uint8, any strides
    index_ptr,  # (N,)
    crop_ptr,  # (N, 2) where CROP
    flip_ptr,  # (N,) where FLIP
    mean_ptr,  # (Cout,)
    std_ptr,  # (Cout,)
    result_ptr,  # (N, Cout, s, s), contiguous or channels-last
    bank_rows,
    pad,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    CROP: tl.constexpr,
    FLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK neighbouring elements of one image of the batch in memory order."""
    n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < CHANNELS_OUT * SIDE * SIDE
    if CHANNELS_LAST:
        c = o % CHANNELS_OUT
        pixel = o // CHANNELS_OUT
    else:
        c = o // (SIDE * SIDE)
        pixel = o % (SIDE * SIDE)
    y = pixel // SIDE
    x = pixel % SIDE
    if FLIP:
        x = tl.where(tl.load(flip_ptr + n).to(tl.int32) != 0, SIDE - 1 - x, x)
    if CROP:
        y += tl.load(crop_ptr + n * 2).to(tl.int32) - pad
        x += tl.load(crop_ptr + n * 2 + 1).to(tl.int32) - pad
    row = tl.load(index_ptr + n).to(tl.int64) + tl.zeros((BLOCK,), tl.int64)
    m_row = (row >= 0) & (row < bank_rows)
    m_bank = m & m_row & (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    at = bank_ptr + row * stride_n + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    if CHANNELS > 1:
        at += c.to(tl.int64) * stride_c
    b_image = tl.load(at, mask=m_bank, other=0).to(tl.float32)
    b_mean = tl.load(mean_ptr + c, mask=m, other=0.0).to(tl.float32)
    b_std = tl.load(std_ptr + c, mask=m, other=1.0).to(tl.float32)
    b_image = tl.div_rn(b_image, tl.full(b_image.shape, 255.0, tl.float32))
    b_image = tl.div_rn(b_image - b_mean, b_std)
    b_image = tl.where(m_row, b_image, float("nan"))
    at = result_ptr + n * (CHANNELS_OUT * SIDE * SIDE) + o
    tl.store(at, b_image.to(result_ptr.dtype.element_ty), mask=m)


def launch(
    bank: Tensor,
    index: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """(N, Cout, s, s) of ``dtype``; NaN for an index that is not in the bank."""
    channels, side = bank.shape[1], bank.shape[-1]
    result = empty_images(bank, len(index), len(mean), dtype, channels_last)
    tables = (index, index if crop is None else crop, index if flip is None else flip, mean, std)
    dispatch.launch(
        _bank_replay_kernel,
        (len(index), triton.cdiv(len(mean) * side * side, BLOCK)),
        bank,
        *(table.contiguous() for table in tables),
        result,
        len(bank),
        pad,
        *bank.stride(),
        SIDE=side,
        CHANNELS=channels,
        CHANNELS_OUT=len(mean),
        CROP=crop is not None,
        FLIP=flip is not None,
        CHANNELS_LAST=channels_last,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return result
