"""bn_match against torch's own BatchNorm, mean and variance, and their autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    draw,
    needs_gpu,
    results,
    runs_kernels,
)
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import BnMatch, bn_match, bn_match_eager, launches, reset_launches

EPS = 1e-5

# name: shape of x, rows, relu, affine, layout
CASES: dict[str, tuple[tuple[int, int, int, int], int | None, bool, bool, str]] = {
    "power of two": ((8, 16, 8, 8), None, False, True, "contiguous"),
    "one image": ((1, 5, 31, 33), 1, True, True, "contiguous"),
    "channels-last, rows < N": ((4, 43, 9, 5), 3, True, True, "channels_last"),
    "one pixel, many channels": ((37, 600, 1, 1), 20, False, True, "contiguous"),
    "no affine": ((3, 5, 7, 7), 1, False, False, "contiguous"),
    "every second channel": ((3, 5, 7, 7), 2, True, True, "strided"),
    "transposed": ((3, 2, 6, 5), 2, False, True, "transposed"),
    "one channel": ((2, 1, 4, 4), None, True, True, "channels_last"),
}


def make(case: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Any, ...]:
    """x, running_mean, running_var, weight, bias and the keywords of a case."""
    (n, c, h, w), rows, relu, affine, layout = CASES[case]
    generator = torch.Generator().manual_seed(sum(map(ord, case)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(n, c, h, w) * 2 + normal(1, c, 1, 1)
    mean, var = x.mean((0, 2, 3)) + 0.3 * normal(c), normal(c).square() + 0.5
    vectors = [mean, var, normal(c) + 1, normal(c)] if affine else [mean, var, None, None]
    x, *vectors = (None if t is None else t.to(dtype).to(device) for t in (x, *vectors))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return (x, *vectors), {"rows": rows, "relu": relu}


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


def with_gradient(
    function: Any, inputs: tuple[Any, ...], options: dict[str, Any], which: tuple[int, ...]
) -> list[Tensor]:
    """The three results and dx for the same random cotangents of the results in ``which``."""
    x = inputs[0].detach().requires_grad_()
    found = function(x, *inputs[1:], EPS, **options)
    cotangents = [draw(k, *out.shape, dtype=out.dtype).to(x.device) for k, out in enumerate(found)]
    (grad,) = torch.autograd.grad([found[i] for i in which], x, [cotangents[i] for i in which])
    return [*(out.detach() for out in found), grad]


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


def assert_layout_is_kept(function: Any, device: str) -> None:
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    for case, layout in (("one image", contiguous), ("channels-last, rows < N", channels_last)):
        inputs, options = make(case, torch.float32, device)
        output, _, _, grad = with_gradient(function, inputs, options, (0, 1, 2))
        assert output.is_contiguous(memory_format=layout)
        assert grad.is_contiguous(memory_format=layout)


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


def check_zero_variance(function: Any, dtype: torch.dtype, device: str) -> None:
    """A constant input, 1 above a mean of 2, where a variance of 4 was expected, 9 channels.

    δ = 1 and v - s = -4 everywhere: loss = √9 + √(9 · 16) = 15; its slope by a pixel is
    δ/‖δ‖/n = 1/(3n), and none through v, whose slope is that pixel's distance from the mean.
    """
    x = torch.full((2, 9, 4, 4), 3.0, dtype=dtype, device=device, requires_grad=True)
    mean, var = x.new_full((9,), 2.0).detach(), x.new_full((9,), 4.0).detach()
    found = function(x, mean, var, None, None, 0.0)
    (grad,) = torch.autograd.grad(found.loss, x)
    assert found.loss.item() == pytest.approx(15, rel=1e-6)
    torch.testing.assert_close(found.output, torch.full_like(x, 0.5))
    torch.testing.assert_close(found.image_means, torch.full_like(x[:, :, 0, 0], 3.0))
    torch.testing.assert_close(grad, torch.full_like(x, 1 / (3 * 32)))


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


def run(function: Any, case: str, which: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The results in ``which`` of a case and dx, on the device the kernels run on."""
    (x, *layer), options = make(case, device=DEVICE)
    vectors = [vector for vector in layer if vector is not None]

    def chosen(x: Tensor, *vectors: Tensor) -> list[Tensor]:
        layer = [*vectors, None, None][:4]
        found = function(x, *layer, EPS, **options)
        return [found[i] for i in which]

    return results(chosen, [x, *vectors], dtype, differentiable=[0])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_twin(case: str, which: tuple[int, ...], dtype: torch.dtype) -> None:
    reset_launches()
    ours = run(bn_match, case, which, dtype)
    assert launches() == {f"_bn_match_{name}_kernel": 1 for name in ("fwd", "loss", "bwd")}
    eager = run(bn_match_eager, case, which, dtype)
    exact = run(bn_match_eager, case, which, torch.float64)
    assert_as_good_as_eager(ours, [eager], exact, dtype)


@runs_kernels
def test_kernel_takes_no_slope_at_a_perfect_match() -> None:
    x = torch.full((3, 5, 31, 33), 1.5, device=DEVICE, requires_grad=True)
    mean, var = torch.full((5,), 1.5, device=DEVICE), torch.zeros(5, device=DEVICE)
    loss = bn_match(x, mean, var, None, None, EPS).loss
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


@runs_kernels
def test_kernel_zero_variance() -> None:
    check_zero_variance(bn_match, torch.float32, DEVICE)


@runs_kernels
def test_kernel_takes_strided_vectors_and_expanded_cotangents() -> None:
    (x, *layer), options = make("power of two", torch.float32, DEVICE)
    strided = [vector.repeat_interleave(2)[::2] for vector in layer]
    wide = torch.zeros(len(x), 3 * x.shape[1], device=DEVICE, requires_grad=True)
    found = []
    for vectors in (layer, strided):
        x = x.detach().requires_grad_()
        match = bn_match(x, *vectors, EPS, **options)
        features = torch.cat([match.image_means, wide], dim=1)
        found.append(torch.autograd.grad(match.output.sum() + features.sum(), x)[0])
    assert torch.equal(*found)


@runs_kernels
def test_kernel_keeps_the_layout_of_x() -> None:
    assert_layout_is_kept(bn_match, DEVICE)


@runs_kernels
def test_kernel_compiles_whole() -> None:
    inputs, options = make("channels-last, rows < N", torch.float32, DEVICE)
    compiled = torch.compile(bn_match, fullgraph=True, backend="aot_eager")
    got = with_gradient(compiled, inputs, options, (0, 1, 2))
    expected = with_gradient(bn_match, inputs, options, (0, 1, 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    arguments = (inputs[0].requires_grad_(), *inputs[1:], EPS, 3, True)
    torch.library.opcheck(torch.ops.kiop_fast.bn_match.default, arguments)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replay_equals_eager(dtype: torch.dtype) -> None:
    (x, *layer), options = make("channels-last, rows < N", dtype, DEVICE)
    x.requires_grad_()
    weights = draw(1, *x.shape, dtype=dtype)

    def step() -> list[Tensor]:
        match = bn_match(x, *layer, EPS, **options)
        total = (match.output * weights).sum() + match.loss + match.image_means.square().sum()
        return [*match, *torch.autograd.grad(total, x)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.detach().copy_(draw(9, *x.shape))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
