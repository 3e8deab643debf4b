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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moving: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor,
        product: Product | None,
    ) -> Tensor:  # fmt: skip
        rows = moving if rows is None else rows
        result = F.linear(rows, weight, bias) if product is None else product(rows, weight.T) + bias
        # Under autocast the result is narrower than what came, and so are the gradient's products.
        ctx.save_for_backward(rows.to(result.dtype), weight.to(result.dtype))
        ctx.moving, ctx.product = len(moving), product or torch.mm
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_moving, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            ctx.product(grad[: ctx.moving], weight) if needs_moving else None,
            None,
            ctx.product(grad.T, rows) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
        )


def linear(
    moving: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = None,
    product: Product | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.linear`` of rows whose leading ones move, as one product each way.

    Args:
        moving: (N, in); they take a gradient.
        weight, bias: (out, in) and (out,).
        rows: (N + M, in) in the dtype that is multiplied: room for the moving rows, which are
            written there, and M constants; None: the moving rows alone.  Until the backward pass
            nobody may write them, nor any other part of their memory.
        product: of two matrices, for example :func:`split_product`; None: torch's.

    Returns:
        (N + M, out).
    """
    if rows is not None:
        with torch.no_grad():
            rows[: len(moving)].copy_(moving)
    result: Tensor = _Linear.apply(moving, rows, weight, bias, product)
    return result
