"""bn_match and its twin against torch's own BatchNorm, mean and variance, and their autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bn_match_cases import (
    CASES,
    EPS,
    assert_layout_is_kept,
    check_zero_variance,
    make,
    with_gradient,
)
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import BnMatch, bn_match, bn_match_eager


def built_in(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: int | None = None,
    relu: bool = False,
) -> BnMatch:
    """torch's own functions, one for each term."""
    output = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    head = x[:rows]
    loss = torch.linalg.vector_norm(head.mean((0, 2, 3)) - mean)
    loss = loss + torch.linalg.vector_norm(head.var((0, 2, 3), unbiased=False) - var)
    return BnMatch(F.relu(output) if relu else output, loss, x.mean((2, 3)))


def operator(x: Tensor, *layer: Any, rows: int | None = None, relu: bool = False) -> BnMatch:
    """The registered operator itself, on the eager twin where there is no GPU."""
    rows = x.shape[0] if rows is None else rows
    return BnMatch(*torch.ops.kiop_fast.bn_match(x, *layer, rows, relu)[:3])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
def test_twin_equals_the_built_ins(case: str, which: tuple[int, ...]) -> None:
    inputs, options = make(case)
    got = with_gradient(bn_match, inputs, options, which)
    expected = with_gradient(built_in, inputs, options, which)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", [bn_match, operator])
def test_layout_of_x_is_kept(function: Any) -> None:
    assert_layout_is_kept(function, "cpu")


@pytest.mark.parametrize("case", ["no affine", "every second channel", "one channel"])
def test_gradcheck(case: str) -> None:
    inputs, options = make(case)
    x = inputs[0].requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(bn_match(x, *inputs[1:], EPS, **options))

    assert torch.autograd.gradcheck(function, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_keeps_its_dtypes_and_sums_in_fp32(case: str, dtype: torch.dtype) -> None:
    inputs, options = make(case, dtype)
    exact = tuple(None if t is None else t.double() for t in inputs)
    got = with_gradient(bn_match, inputs, options, (0, 1, 2))
    expected = with_gradient(built_in, exact, options, (0, 1, 2))
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32, dtype]
    ulp = torch.finfo(dtype).eps
    for ours, theirs, unit in zip(got, expected, (ulp, 1e-6, 1e-6, ulp), strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=2 * unit, atol=2 * unit * float(theirs.abs().max())
        )


def test_norms_at_zero_have_subgradient_zero() -> None:
    x = torch.full((2, 3, 4, 4), 1.5, dtype=torch.float64, requires_grad=True)
    mean, var = torch.full((3,), 1.5).double(), torch.zeros(3).double()
    loss = bn_match(x, mean, var, None, None, EPS).loss
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


def test_zero_variance() -> None:
    check_zero_variance(bn_match, torch.float64, "cpu")
    check_zero_variance(bn_match, torch.float32, "cpu")


def test_variance_does_not_cancel_around_a_far_mean() -> None:
    x = torch.randn(4, 2, 16, 16) * 0.01 + 1000
    mean, var = x.double().mean((0, 2, 3)).float(), torch.zeros(2)
    exact = bn_match(x.double(), mean.double(), var.double(), None, None, EPS).loss
    got = bn_match(x, mean, var, None, None, EPS).loss
    assert float(got) == pytest.approx(float(exact), rel=1e-5)


def test_only_x_gets_a_gradient() -> None:
    inputs, options = make("power of two", torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    result = bn_match(*leaves, EPS, **options)
    (result.output.sum() + result.loss).backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


@pytest.mark.parametrize("function", [bn_match, operator])
def test_output_may_be_changed_in_place(function: Any) -> None:
    """As the nn.ReLU(inplace=True) behind most BatchNorm layers does."""

    def then_relu(*args: Any, relu: bool, **options: Any) -> BnMatch:
        match = function(*args, **options)
        return match._replace(output=F.relu_(match.output))

    inputs, options = make("channels-last, rows < N")
    got = with_gradient(then_relu, inputs, options, (0, 1, 2))
    expected = with_gradient(built_in, inputs, options, (0, 1, 2))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["channels-last, rows < N", "no affine", "every second channel"])
def test_operator_passes_opcheck(case: str) -> None:
    (x, *layer), options = make(case, torch.float32)
    arguments = (x.requires_grad_(), *layer, EPS, options["rows"], options["relu"])
    torch.library.opcheck(torch.ops.kiop_fast.bn_match.default, arguments)


@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_operator_equals_the_twin(case: str, which: tuple[int, ...]) -> None:
    inputs, options = make(case)
    got = with_gradient(operator, inputs, options, which)
    expected = with_gradient(bn_match_eager, inputs, options, which)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [bn_match, operator])
def test_compiles_into_one_graph(function: Any) -> None:
    inputs, options = make("channels-last, rows < N", torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = with_gradient(compiled, inputs, options, (0, 1, 2))
    expected = with_gradient(bn_match_eager, inputs, options, (0, 1, 2))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x of three axes": ({"x": torch.zeros(2, 4, 4)}, "2-d BatchNorm"),
    "no images": ({"x": torch.zeros(0, 3, 4, 4)}, "none of them 0"),
    "a short running_mean": ({"running_mean": torch.zeros(2)}, r"\(3,\) each"),
    "a weight of two axes": ({"weight": torch.ones(3, 1)}, "weight"),
    "no rows": ({"rows": 0}, "rows 0 of 2"),
    "too many rows": ({"rows": 3}, "rows 3 of 2"),
    "a negative eps": ({"eps": -1.0}, "eps"),
    "integers": ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "floating point"),
    "another device": ({"running_var": torch.ones(3, device="meta")}, "different devices"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name: str) -> None:
    good = {"x": torch.zeros(2, 3, 4, 4), "running_mean": torch.zeros(3)}
    good |= {"running_var": torch.ones(3), "weight": None, "bias": None, "eps": EPS}
    changes, message = BAD[name]
    with pytest.raises(KernelError, match=message):
        bn_match(**good | changes)
