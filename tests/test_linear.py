"""The linear layer of the projection head: moving and fixed rows, gradients written in place."""

from __future__ import annotations

import pytest
import torch
from stand_ins import wave

from kiop_fast.runtime.linear import Worked, linear, split_product
from kiop_fast.runtime.optimizers import set_gradients


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    """Moving rows, fixed rows, weight, bias and cotangent."""
    shapes = ((5, 7), (3, 7), (4, 7), (4,), (8, 4))
    return [wave(*shape, pace=0.3 + k).to(dtype) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("fixed_rows", [0, 3])
def test_gradients_of_moving_rows_weight_and_bias(fixed_rows: int) -> None:
    """Against y = x wᵀ + b: dx = g w on the moving rows, dw = gᵀ x, db = Σ g."""
    moving, fixed, weight, bias, cotangent = operands(torch.float64)
    fixed, cotangent = fixed[:fixed_rows], cotangent[: 5 + fixed_rows]
    learned = [t.requires_grad_() for t in (moving, weight, bias)]
    into = torch.full_like(weight, torch.nan)
    ours = linear(moving, weight, bias, fixed, into=into)
    rows = torch.cat([moving, fixed]).detach()
    torch.testing.assert_close(ours, rows @ weight.T + bias)
    by_moving, by_weight, by_bias = torch.autograd.grad(ours, learned, cotangent)
    torch.testing.assert_close(by_moving, (cotangent @ weight)[:5])
    torch.testing.assert_close(by_weight, cotangent.T @ rows)
    torch.testing.assert_close(by_bias, cotangent.sum(0))
    assert by_weight.data_ptr() == into.data_ptr()


def test_split_products_of_moving_and_fixed_rows() -> None:
    moving, fixed, weight, bias, cotangent = operands(torch.float32)
    weight.requires_grad_()
    ours = linear(moving, weight, bias, fixed, product=split_product)
    rows = torch.cat([moving, fixed])
    torch.testing.assert_close(ours, rows @ weight.T + bias, rtol=1e-4, atol=1e-4)
    (by_weight,) = torch.autograd.grad(ours, weight, cotangent)
    torch.testing.assert_close(by_weight, cotangent.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_parameter_in_another_dtype_learns_by_its_copy() -> None:
    """Rounded to bf16 (8 bits) each way, in the parameter's own dtype, where it lay before."""
    parameter = torch.nn.Parameter(wave(4, 7))
    worked = Worked(parameter, torch.bfloat16)
    places = []
    for step in range(2):
        with torch.no_grad():
            parameter.add_(step)
        worked.refresh()
        assert torch.equal(worked.value, parameter.bfloat16())
        x = wave(3, 7).bfloat16()
        y = linear(x, worked.value, torch.zeros(4).bfloat16(), into=worked.grad)
        set_gradients(y.float().square().sum(), [parameter], [worked.value])
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        exact = 2 * (x.float() @ parameter.T).T @ x.float()
        torch.testing.assert_close(parameter.grad, exact.detach(), rtol=0.03, atol=0.1)
        places.append((worked.value.data_ptr(), worked.grad.data_ptr(), parameter.grad.data_ptr()))
    assert places[0] == places[1]


def test_a_parameter_in_its_own_dtype_is_not_copied() -> None:
    parameter = torch.nn.Parameter(wave(4, 7))
    worked = Worked(parameter, torch.float32)
    assert worked.value is parameter
    worked.refresh()
