"""The Triton kernels of prompt_pad; the math is in ``prompt_pad.py``.

Both kernels find a cell's place from the ring sides alone, so no index table has to exist on the
device.  The rings' cells come side by side, (C, T) with T = Σ n_k.  No atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.dispatch import tl, triton

# Not measured on a GPU yet.  Chosen for loads in flight: a program keeps FWD_BLOCK · FWD_IMAGES
# (BWD_BLOCK · BWD_IMAGES) of them, and border values are made once for FWD_IMAGES images.
FWD_BLOCK, FWD_IMAGES = 1024, 4
BWD_BLOCK, BWD_IMAGES = 128, 16
NUM_WARPS = 4


@dispatch.jit
def _peel(cell, inside, y, x, START: tl.constexpr, s: tl.constexpr, S: tl.constexpr):
    """Takes one ring off: positions on its S × S canvas → cells on the border, (y, x) inside.

    A border position's place in row-major order follows from its band: the rows above, beside or
    below the inner s × s canvas.
    """
    left = (S - s + 1) // 2
    above = y < left
    beside = (y >= left) & (y < left + s)
    row = tl.where(above, y * S, tl.where(beside, left * S + (y - left) * (S - s), y * S - s * s))
    place = row + tl.where(beside & (x >= left), x - s, x)
    still = inside & beside & (x >= left) & (x < left + s)
    return tl.where(inside & ~still, START + place, cell), still, y - left, x - left


@dispatch.jit
def _put_on(cell, y, x, START: tl.constexpr, s: tl.constexpr, S: tl.constexpr):
    """The inverse: this ring's cells → (y, x) on its canvas; earlier rings' cells move outwards."""
    left = (S - s + 1) // 2
    place = cell - START
    above = place < left * S
    beside_at = place - left * S
    beside = (beside_at >= 0) & (beside_at < s * (S - s))
    x_beside = beside_at % (S - s)
    x_beside = tl.where(x_beside < left, x_beside, x_beside + s)
    full_at = tl.where(above, place, place + s * s)
    y_here = tl.where(beside, left + beside_at // (S - s), full_at // S)
    x_here = tl.where(beside, x_beside, full_at % S)
    here = (place >= 0) & (place < S * S - s * s)
    y = tl.where(here, y_here, tl.where(place < 0, y + left, y))
    x = tl.where(here, x_here, tl.where(place < 0, x + left, x))
    return y, x


@dispatch.jit
def _prompt_pad_fwd_kernel(
    image_ptr,  # (N, C, s, s), any strides
    cells_ptr,  # (C, T)
    canvas_ptr,  # (N, C, S, S), contiguous or channels-last
    n_images,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    SIDES: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK neighbouring elements of the canvas in memory order, in IMAGES images."""
    S: tl.constexpr = SIDES[len(SIDES) - 1]
    cells: tl.constexpr = S * S - SIDES[0] * SIDES[0]
    o_canvas = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_canvas = o_canvas < CHANNELS * S * S
    if CHANNELS_LAST:
        c = o_canvas % CHANNELS
        position = o_canvas // CHANNELS
    else:
        c = o_canvas // (S * S)
        position = o_canvas % (S * S)
    y = position // S
    x = position % S
    cell = tl.full((BLOCK,), -1, tl.int32)
    inside = o_canvas >= 0
    for peeled in tl.static_range(len(SIDES) - 1):
        cell, inside, y, x = _peel(
            cell,
            inside,
            y,
            x,
            SIDES[len(SIDES) - 2 - peeled] * SIDES[len(SIDES) - 2 - peeled] - SIDES[0] * SIDES[0],
            SIDES[len(SIDES) - 2 - peeled],
            SIDES[len(SIDES) - 1 - peeled],
        )
    m_border = m_canvas & (cell >= 0)
    m_inside = m_canvas & (cell < 0)
    b_border = tl.load(cells_ptr + c * cells + cell, mask=m_border, other=0.0).to(tl.float32)
    b_border = tl.sigmoid(b_border)
    o_image = c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    n = (tl.program_id(1).to(tl.int64) * IMAGES + tl.arange(0, IMAGES))[:, None]
    m_n = n < n_images
    at = image_ptr + n * stride_n + o_image[None, :]
    b_image = tl.load(at, mask=m_n & m_inside[None, :], other=0.0).to(tl.float32)
    b_canvas = tl.where(m_inside[None, :], b_image, b_border[None, :])
    at = canvas_ptr + n * (CHANNELS * S * S) + o_canvas[None, :]
    tl.store(at, b_canvas.to(canvas_ptr.dtype.element_ty), mask=m_n & m_canvas[None, :])


@dispatch.jit
def _prompt_pad_bwd_kernel(
    grad_ptr,  # (N, C, S, S), any strides
    cells_ptr,  # (C, T)
    grad_cells_ptr,  # (C, T)
    n_images,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    SIDES: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK cells summed over the batch in a fixed order, IMAGES loads in flight."""
    S: tl.constexpr = SIDES[len(SIDES) - 1]
    cells: tl.constexpr = S * S - SIDES[0] * SIDES[0]
    o_flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_cells = o_flat < CHANNELS * cells
    # Neighbouring threads read neighbours in the gradient's memory.
    if CHANNELS_LAST:
        c = o_flat % CHANNELS
        cell = o_flat // CHANNELS
    else:
        c = o_flat // cells
        cell = o_flat % cells
    o_cells = c * cells + cell
    y = tl.zeros((BLOCK,), tl.int32)
    x = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(len(SIDES) - 1):
        y, x = _put_on(
            cell, y, x, SIDES[k] * SIDES[k] - SIDES[0] * SIDES[0], SIDES[k], SIDES[k + 1]
        )
    o_grad = c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    b_sum = tl.zeros((IMAGES, BLOCK), tl.float32)
    for first in range(0, n_images, IMAGES):
        n = first + tl.arange(0, IMAGES)[:, None]
        at = grad_ptr + n.to(tl.int64) * stride_n + o_grad[None, :]
        b_grad = tl.load(at, mask=(n < n_images) & m_cells[None, :], other=0.0)
        b_sum += b_grad.to(tl.float32)
    b_sigmoid = tl.sigmoid(tl.load(cells_ptr + o_cells, mask=m_cells, other=0.0).to(tl.float32))
    b_out = tl.sum(b_sum, axis=0) * b_sigmoid * (1 - b_sigmoid)
    tl.store(grad_cells_ptr + o_cells, b_out.to(grad_cells_ptr.dtype.element_ty), mask=m_cells)


def launch_fwd(
    image: Tensor, cells: Tensor, sizes: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    canvas = empty_canvas(image, sizes, dtype, channels_last)
    sides = (image.shape[-1], *sizes)
    grid = (triton.cdiv(canvas[0].numel(), FWD_BLOCK), triton.cdiv(len(image), FWD_IMAGES))
    dispatch.launch(
        _prompt_pad_fwd_kernel,
        grid,
        image,
        cells.contiguous(),
        canvas,
        len(image),
        *image.stride(),
        SIDES=sides,
        CHANNELS=image.shape[1],
        CHANNELS_LAST=channels_last,
        IMAGES=FWD_IMAGES,
        BLOCK=FWD_BLOCK,
        num_warps=NUM_WARPS,
    )
    return canvas


def launch_bwd(grad: Tensor, cells: Tensor, sides: Sequence[int]) -> Tensor:
    cells = cells.contiguous()
    grad_cells = torch.empty_like(cells)
    dispatch.launch(
        _prompt_pad_bwd_kernel,
        (triton.cdiv(cells.numel(), BWD_BLOCK),),
        grad,
        cells,
        grad_cells,
        len(grad),
        *grad.stride(),
        SIDES=tuple(sides),
        CHANNELS=grad.shape[1],
        CHANNELS_LAST=grad.stride(1) == 1,
        IMAGES=BWD_IMAGES,
        BLOCK=BWD_BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad_cells


def empty_canvas(
    image: Tensor, sizes: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return torch.empty(
        (*image.shape[:2], sizes[-1], sizes[-1]),
        dtype=dtype,
        device=image.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
