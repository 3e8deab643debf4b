"""prompt_pad: an image and any number of nested rings → the prompted canvas, in one pass.

Ring k takes a canvas of side s = S_{k-1} (the image for k = 1) to side S = S_k:
left = top = (S - s + 1) // 2, right = bottom = (S - s) // 2.  The interior is the previous
canvas, the border is sigmoid(cells_k) (paper section 4.1; SPEC section 2).

    image   (N, C, s, s)        cells_k (C, n_k), n_k = S_k² - S_{k-1}², row-major over the border
    canvas  (N, C, S_n, S_n)
    d cells_k = sigmoid'(cells_k) · Σ_N d canvas[border_k],   d image = d canvas[interior]

Kernels take the rings' cells side by side, (C, T) with T = Σ n_k = S_n² - s².  Bytes moved, b an
element: forward N·C·(s² + S_n²)·b and the cells once per IMAGES images (L2); backward reads
N·C·T·b and writes C·T·b, the interior of the gradient is never read.  The image gradient is a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch
from kiop_fast.kernels.prompt_pad_triton import empty_canvas, launch_bwd, launch_fwd


def ring_padding(s: int, S: int) -> tuple[int, int]:
    """(left, right) padding, pixels, from side ``s`` to side ``S``; top = left, bottom = right."""
    return (S - s + 1) // 2, (S - s) // 2


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # later callers may want gradients
def border_index(s: int, S: int) -> Tensor:
    """Flat positions of a ring's cells on its S × S canvas, row-major: LongTensor (S² - s²,).

    The tensor is cached on the CPU and shared between callers: do not write to it.
    """
    left, _ = ring_padding(s, S)
    border = torch.ones(S, S, dtype=torch.bool)
    border[left : left + s, left : left + s] = False
    return border.view(-1).nonzero().view(-1)


def prompt_pad_eager(
    image: Tensor,
    cells: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """The same in plain torch: one (C, S, S) background, then pad and add over the batch."""
    dtype = image.dtype if dtype is None else dtype
    image = image.to(dtype)
    if len(cells) > 0:
        side = image.shape[-1]
        background = image.new_zeros(image.shape[1], side, side)
        for ring, size in zip(cells, sizes, strict=True):
            background = _surround(background, ring.sigmoid().to(dtype), size)
        left = _offset([side, *sizes])
        right = sizes[-1] - side - left
        image = F.pad(image, (left, right, left, right)) + background
    return image.contiguous(memory_format=torch.channels_last) if channels_last else image


def _offset(sides: Sequence[int]) -> int:
    """Left (= top) edge of the image on the outermost canvas, pixels."""
    return sum(ring_padding(s, S)[0] for s, S in pairwise(sides))


def _surround(inner: Tensor, border: Tensor, size: int) -> Tensor:
    """inner (C, s, s) inside border (C, S² - s²) → (C, S, S)."""
    channels, side, _ = inner.shape
    left, right = ring_padding(side, size)
    top, middle, bottom = border.split([left * size, side * (size - side), right * size], dim=1)
    west, east = middle.view(channels, side, size - side).split([left, right], dim=2)
    rows = [top.view(channels, left, size), torch.cat([west, inner, east], dim=2)]
    return torch.cat([*rows, bottom.view(channels, right, size)], dim=1)


def _cells_of(canvas: Tensor, sides: Sequence[int]) -> Tensor:
    """(C, S, S) → (C, T): what stands where each ring's cells are, innermost ring first."""
    rings = []
    for s, S in reversed(list(pairwise(sides))):
        left, _ = ring_padding(s, S)
        rings.append(canvas.flatten(1)[:, border_index(s, S).to(canvas.device)])
        canvas = canvas[:, left : left + s, left : left + s]
    return torch.cat(rings[::-1], dim=1)


@torch.library.custom_op("kiop_fast::prompt_pad", mutates_args=())
def _prompt_pad(
    image: Tensor, cells: Tensor, sizes: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    if dispatch.use_triton("prompt_pad", image, cells):
        return launch_fwd(image, cells, sizes, dtype, channels_last)
    sides = [image.shape[-1], *sizes]
    rings = cells.split([S * S - s * s for s, S in zip(sides, sizes, strict=False)], dim=1)
    return prompt_pad_eager(image, rings, sizes, dtype=dtype, channels_last=channels_last)


@_prompt_pad.register_fake
def _(image, cells, sizes, dtype, channels_last):  # type: ignore[no-untyped-def]
    return empty_canvas(image, sizes, dtype, channels_last)


@torch.library.custom_op("kiop_fast::prompt_pad_backward", mutates_args=())
def _prompt_pad_backward(grad: Tensor, cells: Tensor, sides: Sequence[int]) -> Tensor:
    if dispatch.use_triton("prompt_pad", grad, cells):
        return launch_bwd(grad, cells, sides)
    dtype = dispatch.accumulation_dtype(grad, cells)
    value = cells.to(dtype).sigmoid()
    border = _cells_of(grad.sum(0, dtype=dtype), sides)
    return (border * value * (1 - value)).to(cells.dtype)


@_prompt_pad_backward.register_fake
def _(grad, cells, sides):  # type: ignore[no-untyped-def]
    return torch.empty_like(cells, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, cells, sizes, _, _ = inputs
    ctx.save_for_backward(cells)
    ctx.sides = (image.shape[-1], *sizes)
    ctx.image_dtype = image.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cells,) = ctx.saved_tensors
    grad_image = grad_cells = None
    if ctx.needs_input_grad[0]:
        left, side = _offset(ctx.sides), ctx.sides[0]
        interior = grad.narrow(2, left, side).narrow(3, left, side)
        grad_image = interior.to(ctx.image_dtype)
    if ctx.needs_input_grad[1]:
        grad_cells = _prompt_pad_backward(grad, cells, ctx.sides)
    return grad_image, grad_cells, None, None, None


_prompt_pad.register_autograd(_backward, setup_context=_setup_context)


def prompt_pad(
    image: Tensor,
    cells: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Puts an image inside nested rings of learnable cells (paper section 4.1).

    Args:
        image: (N, C, s, s), already normalised.
        cells: ring k's border cells (C, S_k² - S_{k-1}²), before the sigmoid; row-major order.
        sizes: S_k, side of the canvas after ring k, pixels; strictly increasing from s.
        dtype: of the canvas; the image's by default.
        channels_last: store the canvas channels-last.

    Returns:
        (N, C, S_n, S_n); the image itself (cast) when there are no rings.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit, rings that do not nest.
    """
    _check(image, cells, sizes, dtype)
    if not cells or not dispatch.use_triton("prompt_pad", image, *cells):
        return prompt_pad_eager(image, cells, sizes, dtype=dtype, channels_last=channels_last)
    flat = cells[0] if len(cells) == 1 else torch.cat(list(cells), dim=1)
    return _prompt_pad(image, flat, sizes, dtype or image.dtype, channels_last)


def _check(
    image: Tensor, cells: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype | None
) -> None:
    if image.ndim != 4 or image.shape[2] != image.shape[3] or 0 in image.shape:
        raise KernelError(
            "prompt_pad takes a batch of square images",
            got=f"image {tuple(image.shape)}",
            expected="(N, C, s, s), none of them 0",
        )
    side, channels = image.shape[-1], image.shape[1]
    sides = [side, *sizes]
    if len(cells) != len(sizes) or any(a >= b for a, b in zip(sides, sizes, strict=False)):
        raise KernelError(
            "prompt_pad: rings do not nest around the image",
            got=f"image side {side}, {len(cells)} cell tensors, sizes {list(sizes)}",
            expected="one cell tensor a size, sizes strictly increasing from the image side",
        )
    expected = [(channels, b * b - a * a) for a, b in zip(sides, sizes, strict=False)]
    if any(tuple(ring.shape) != shape for ring, shape in zip(cells, expected, strict=True)):
        raise KernelError(
            "prompt_pad: ring cells have the wrong shape",
            got=f"{[tuple(ring.shape) for ring in cells]} for sizes {list(sizes)}",
            expected=f"(C, S² - s²) a ring: {expected}",
        )
    named = {f"cells[{k}]": ring for k, ring in enumerate(cells)}
    dispatch.require_floating("prompt_pad", image=image, **named)
    dispatch.require_same_device("prompt_pad", image=image, **named)
    if dtype is not None and not dtype.is_floating_point:
        raise KernelError("prompt_pad: the canvas must be floating point", got=dtype)
