"""bn_match's Triton kernels against the eager twin, whose own error is the yardstick."""

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
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    capture,
    draw,
    needs_gpu,
    results,
    runs_kernels,
)
from torch import Tensor

from kiop_fast.kernels import bn_match, bn_match_eager, launches, reset_launches


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

    graph, captured = capture(step)
    x.detach().copy_(draw(9, *x.shape))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
