"""The two operations of a windowed batch that are neither sliding nor pointwise, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Hole = tuple[Any, slice, slice]  # where the window lies, as an index


class Paste(torch.autograd.Function):
    """A border (1, C, a, b) around windows (N, C, h, w) → (N, C, a, b)."""

    @staticmethod
    def forward(ctx: Any, around: Tensor, window: Tensor, top: int, left: int) -> Tensor:
        rows, columns = slice(top, top + window.shape[2]), slice(left, left + window.shape[3])
        ctx.hole = (..., rows, columns)
        shape = (len(window), *around.shape[1:])
        result = window.new_empty(shape).contiguous(memory_format=torch.channels_last)
        result.copy_(around.expand(shape))
        result[ctx.hole] = window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_around = by_window = None
        if ctx.needs_input_grad[0]:
            by_around = grad.sum(0, keepdim=True)
            by_around[ctx.hole] = 0
        if ctx.needs_input_grad[1]:
            by_window = grad[ctx.hole]
        return by_around, by_window, None, None


class WindowedBatchNorm(torch.autograd.Function):
    """BatchNorm of a windowed batch with the statistics of the whole of it; affine frozen."""

    @staticmethod
    def forward(
        ctx: Any, surround: Tensor, window: Tensor, weight: Tensor | None, bias: Tensor | None,
        hole: Hole, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pixels, inside = surround[0, 0].numel(), window[0, 0].numel()
        outside = pixels - inside
        acc = torch.promote_types(window.dtype, torch.float32)
        of_window, mean_of_window = torch.var_mean(window.to(acc), (0, 2, 3), correction=0)
        mean_outside = _without(surround.to(acc), hole).sum((0, 2, 3)) / outside
        centred = _without(surround - mean_outside[:, None, None], hole)
        squares = centred.square().sum((0, 2, 3))
        between = (mean_of_window - mean_outside).square() * (inside * outside / pixels)
        mean = (mean_of_window * inside + mean_outside * outside) / pixels
        var = (of_window * inside + squares + between) / pixels
        ctx.save_for_backward(surround, window, weight, mean, var)
        ctx.hole, ctx.eps = hole, eps
        ctx.set_materialize_grads(True)
        return tuple(
            F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps) for x in (surround, window)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        surround, window, weight, mean, var = ctx.saved_tensors
        dtype, grads = window.dtype, tuple(grad.to(mean.dtype) for grad in grads)
        by_surround, by_window = _without(grads[0], ctx.hole), grads[1]
        rows, pixels = len(window), surround[0, 0].numel()
        inverse = (var + ctx.eps).rsqrt()
        total = by_surround.sum((0, 2, 3)) + by_window.sum((0, 2, 3))
        moment = (by_surround * surround).sum((0, 2, 3)) + (by_window * window).sum((0, 2, 3))
        moment = (moment - mean * total) * inverse.square() / (rows * pixels)
        level = total / (rows * pixels) - moment * mean
        scale = (inverse if weight is None else inverse * weight)[:, None, None]
        slope, shift = moment[:, None, None] * scale, level[:, None, None] * scale

        def gradient(grad: Tensor, x: Tensor, times: int) -> Tensor:
            centred = (grad * scale).sub_(shift * times).addcmul_(x, slope, value=-times)
            return centred.to(dtype)

        return (
            _without(gradient(by_surround, surround, rows), ctx.hole),
            gradient(by_window, window, 1),
            None, None, None, None,
        )  # fmt: skip


def _without(x: Tensor, hole: Hole) -> Tensor:
    x = x.clone()
    x[hole] = 0
    return x
