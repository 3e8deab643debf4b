"""The linear layer of the projection head: moving and fixed rows."""

from __future__ import annotations

import pytest
import torch
from stand_ins import wave

from kiop_fast.runtime.linear import linear, split_product


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    """Moving rows, fixed rows, weight, bias and cotangent."""
    shapes = ((5, 7), (3, 7), (4, 7), (4,), (8, 4))
    return [wave(*shape, pace=0.3 + k).to(dtype) for k, shape in enumerate(shapes)]


def room_and(fixed: torch.Tensor) -> torch.Tensor:
    """Fixed rows behind room for the five that move, in a part of a wider buffer."""
    buffer = torch.full((5 + len(fixed), 2 * fixed.shape[1]), torch.nan, dtype=fixed.dtype)
    buffer[5:, : fixed.shape[1]] = fixed
    return buffer[:, : fixed.shape[1]]


@pytest.mark.parametrize("fixed_rows", [0, 3])
def test_gradients_of_moving_rows_weight_and_bias(fixed_rows: int) -> None:
    """Against y = x wᵀ + b: dx = g w on the moving rows, dw = gᵀ x, db = Σ g."""
    moving, fixed, weight, bias, cotangent = operands(torch.float64)
    fixed, cotangent = fixed[:fixed_rows], cotangent[: 5 + fixed_rows]
    learned = [t.requires_grad_() for t in (moving, weight, bias)]
    ours = linear(moving, weight, bias, room_and(fixed))
    rows = torch.cat([moving, fixed]).detach()
    torch.testing.assert_close(ours, rows @ weight.T + bias)
    by_moving, by_weight, by_bias = torch.autograd.grad(ours, learned, cotangent)
    torch.testing.assert_close(by_moving, (cotangent @ weight)[:5])
    torch.testing.assert_close(by_weight, cotangent.T @ rows)
    torch.testing.assert_close(by_bias, cotangent.sum(0))


def test_split_products_of_moving_and_fixed_rows() -> None:
    moving, fixed, weight, bias, cotangent = operands(torch.float32)
    weight.requires_grad_()
    ours = linear(moving, weight, bias, room_and(fixed), product=split_product)
    rows = torch.cat([moving, fixed])
    torch.testing.assert_close(ours, rows @ weight.T + bias, rtol=1e-4, atol=1e-4)
    (by_weight,) = torch.autograd.grad(ours, weight, cotangent)
    torch.testing.assert_close(by_weight, cotangent.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast(inside: bool) -> None:
    """bf16 has 8 bits, in the result and in gradients, which keep the dtypes of what came."""
    moving, fixed, weight, bias, cotangent = operands(torch.float32)
    learned = [t.requires_grad_() for t in (moving, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear(moving, weight, bias, room_and(fixed))
        if inside:
            grads = torch.autograd.grad(ours, learned, cotangent.bfloat16())
    if not inside:
        grads = torch.autograd.grad(ours, learned, cotangent.bfloat16())
    assert ours.dtype == torch.bfloat16
    rows = torch.cat([moving, fixed]).detach()
    expected = ((cotangent @ weight)[:5], cotangent.T @ rows, cotangent.sum(0))
    for found, exact in zip(grads, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.detach(), rtol=0.02, atol=0.05)
