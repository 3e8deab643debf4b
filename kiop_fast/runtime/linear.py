"""A linear layer over rows of which the leading ones move, its products plain or split.

Split in three bfloat16 products it has nearly fp32's accuracy at bfloat16's speed.  A float is
split into two bfloat16 parts, x = hi + lo + O(2⁻¹⁶ x).  Of the four products of two split factors
all but lo · lo are kept, as one matrix product of thrice the inner length with fp32 sums:

    x wᵀ ≈ [x_hi  x_hi  x_lo] · [w_hi  w_lo  w_hi]ᵀ

Relative error about 4e-6; fp32 itself 1e-7, TF32 3e-4, bfloat16 2e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Product = Callable[[Tensor, Tensor], Tensor]


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 → its bfloat16 value and that of the rest."""
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) · (K, N) fp32 → (M, N) fp32 in three bfloat16 products."""
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    left = torch.cat([a_high, a_high, a_low], dim=1)
    right = torch.cat([b_high, b_low, b_high], dim=0)
    if a.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # products of bfloat16 numbers are exact in fp32


class Worked:
    """A parameter as the products of a step take it; nothing of its size is made anew a step.

    Args:
        parameter: what the optimiser moves.
        dtype: what products take.

    Attributes:
        value: the parameter itself if it has that dtype, else a copy, brought up to date by
            :meth:`refresh`; the leaf that gradients are asked for.
        grad: where a product writes the gradient of ``value``.
    """

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.parameter = self.value = parameter
        if parameter.dtype != dtype:
            self.value = torch.empty_like(parameter, dtype=dtype).requires_grad_()
        self.grad = torch.empty_like(self.value)

    @torch.no_grad()
    def refresh(self) -> None:
        """After the parameter has moved."""
        if self.value is not self.parameter:
            self.value.copy_(self.parameter)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moving: Tensor, fixed: Tensor | None, weight: Tensor, bias: Tensor,
        product: Product | None, into: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = moving if fixed is None else torch.cat([moving.to(fixed.dtype), fixed])
        ctx.save_for_backward(rows, weight)
        ctx.moving, ctx.dtype, ctx.product, ctx.into = len(moving), moving.dtype, product, into
        return F.linear(rows, weight, bias) if product is None else product(rows, weight.T) + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_moving, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        product, by_moving, by_weight = ctx.product or torch.mm, None, None
        if needs_moving:
            by_moving = product(grad[: ctx.moving], weight).to(ctx.dtype)
        if needs_weight and ctx.into is not None and ctx.product is None:
            by_weight = torch.mm(grad.T, rows, out=ctx.into)
        elif needs_weight:
            by_weight = product(grad.T, rows)
        return by_moving, None, by_weight, grad.sum(0) if needs_bias else None, None, None


def linear(
    moving: Tensor, weight: Tensor, bias: Tensor, fixed: Tensor | None = None,
    product: Product | None = None, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.linear`` of [moving; fixed] as one product each way.

    Args:
        moving: (N, in); they take a gradient.
        weight, bias: (out, in) and (out,).
        fixed: (M, in), constants.
        product: of two matrices, for example :func:`split_product`; None: torch's.
        into: where the weight's gradient is written (by torch's product); None: a new tensor.

    Returns:
        (N + M, out).
    """
    result: Tensor = _Linear.apply(moving, fixed, weight, bias, product, into)
    return result
