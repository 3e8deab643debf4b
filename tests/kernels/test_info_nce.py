"""info_nce against torch's cross-entropy over the whole table of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    draw,
    many_examples,
    needs_gpu,
    results,
    runs_kernels,
    some_examples,
)
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import info_nce, info_nce_eager, launches, reset_launches

OP = torch.ops.kiop_fast.info_nce

# name: queries, keys, width, temperature, number of keys that count (None: all)
CASES: dict[str, tuple[int, int, int, float, int | None]] = {
    "power of two": (64, 128, 32, 0.6, None),
    "empty bank": (10, 10, 16, 0.6, None),
    "odd": (43, 100, 31, 0.1, None),
    "many shares": (10, 1000, 48, 0.6, None),
    "one query": (1, 43, 16, 0.07, None),
    "one query, one key": (1, 1, 1, 0.6, None),
    "growing bank": (100, 170, 16, 0.6, 77),
    "all keys given": (20, 100, 16, 0.6, 100),
    "more promised than there are": (20, 100, 16, 0.6, 1000),
    "nothing yet": (20, 100, 16, 0.6, 0),
}


def make(case: str) -> tuple[list[Tensor], float, Tensor | None]:
    """[queries, keys, weights] in fp64, L2-normalised; temperature; num_keys."""
    m, k, width, temperature, count = CASES[case]
    keys = F.normalize(draw(1, k, width), dim=1)
    queries = F.normalize(keys[:m] + draw(2, m, width), dim=1)
    num_keys = None if count is None else torch.tensor(count, device=DEVICE)
    return [queries, keys, draw(3, m).abs() / m], temperature, num_keys


def cross_entropy(
    queries: Tensor, keys: Tensor, weights: Tensor, temperature: float, num_keys: Tensor | None
) -> Tensor:
    """Σ w_i CE(q_i kᵀ / τ, i) over the rows and columns that count, by torch's own loss."""
    count = len(keys) if num_keys is None else min(int(num_keys), len(keys))
    queries, weights = queries[:count], weights[:count]
    if count == 0:
        return (queries.sum() + weights.sum()) * 0
    logits = queries @ keys[:count].detach().T / temperature
    target = torch.arange(len(queries), device=DEVICE)
    return (F.cross_entropy(logits, target, reduction="none") * weights).sum()


def call(
    function: Callable[..., Tensor], temperature: float, num_keys: Tensor | None
) -> Callable[..., Any]:
    return lambda q, k, w: function(q, k, temperature, w, num_keys=num_keys)


def spoil(keys: Tensor, count: int) -> Tensor:
    """Keys from ``count`` on hold NaN and infinity, as memory that nobody wrote may."""
    keys = keys.clone()
    keys[count:] = math.nan
    keys[count::2] = math.inf
    return keys


@pytest.mark.parametrize("case", CASES)
def test_twin_is_cross_entropy(case: str) -> None:
    inputs, temperature, num_keys = make(case)
    ours = results(call(info_nce_eager, temperature, num_keys), inputs, torch.float64, [0])
    exact = results(
        lambda q, k, w: cross_entropy(q, k, w, temperature, num_keys), inputs, torch.float64, [0]
    )
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


def test_twin_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, *rest = make("growing bank")
    whole = results(call(info_nce_eager, *rest), inputs, torch.float64, [0])
    monkeypatch.setitem(info_nce_eager.__globals__, "CHUNK", 170 * 7)
    for name, value in results(call(info_nce_eager, *rest), inputs, torch.float64, [0]).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_operator_gradient_is_the_twins(case: str) -> None:
    inputs, temperature, num_keys = make(case)

    def operator(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return OP(q, k, w, num_keys, temperature, True)[0]

    ours = results(operator, inputs, torch.float64, [0])
    twin = results(call(info_nce_eager, temperature, num_keys), inputs, torch.float64, [0])
    for name, value in twin.items():
        assert torch.equal(ours[name], value)


def test_gradcheck() -> None:
    (queries, keys, weights), temperature, num_keys = make("empty bank")
    queries = queries[:, :5].clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda q: info_nce_eager(q, keys[:, :5], temperature, weights, num_keys=num_keys), queries
    )


def test_keys_get_no_gradient_and_need_none() -> None:
    (queries, keys, weights), temperature, _ = make("odd")
    keys.requires_grad_()
    loss = info_nce(queries, keys, temperature, weights)
    assert not loss.requires_grad
    info_nce(queries.requires_grad_(), keys, temperature, weights).backward()
    assert keys.grad is None


def check_ignored(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """What lies beyond num_keys, in keys, queries and weights, changes nothing."""
    (queries, keys, weights), temperature, num_keys = make("growing bank")
    clean = [queries, keys, weights]
    dirty = [spoil(x, 77) for x in clean]
    one_element = call(function, temperature, num_keys.view(1).int())
    expected = results(call(function, temperature, num_keys), clean, dtype, [0])
    for name, value in results(one_element, dirty, dtype, [0]).items():
        assert torch.equal(value, expected[name]), name
    assert expected["gradient 0"][77:].eq(0).all()


def test_twin_ignores_what_does_not_count() -> None:
    check_ignored(info_nce_eager, torch.float64)


def check_extremes(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Equal keys give log K and no slope; logits of ±10⁵ give their plain difference."""
    one = torch.ones(1, 16, dtype=dtype, device=DEVICE)
    queries = one.repeat(5, 1).requires_grad_()
    loss = function(queries, one.expand(43, -1), 0.6, torch.full_like(one[0, :1], 0.2).expand(5))
    (grad,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(math.log(43), rel=1e-6)
    assert grad.abs().max() <= 4 * torch.finfo(dtype).eps
    queries = (1e5 * one / 16).requires_grad_()
    loss = function(queries, torch.cat([-one, one]), 1.0, one[0, :1])
    (grad,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(2e5, rel=1e-6)
    torch.testing.assert_close(grad, 2 * one)


def test_twin_extremes() -> None:
    check_extremes(info_nce_eager, torch.float64)
    check_extremes(info_nce_eager, torch.float32)


def check_property(
    data: st.DataObject, function: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    m = data.draw(st.integers(1, 70))
    k = m + data.draw(st.integers(0, 70))
    width = data.draw(st.integers(1, 33))
    count = data.draw(st.none() | st.integers(0, k + 3))
    temperature = data.draw(st.sampled_from([0.05, 0.6, 7.0]))
    scale = data.draw(st.sampled_from([0.0, 1.0, 100.0]))
    seed = data.draw(st.integers(0, 999))
    inputs = [draw(seed, m, width) * scale, draw(seed + 1, k, width), draw(seed + 2, m)]
    inputs = [x.to(dtype).double() for x in inputs]
    num_keys = None if count is None else torch.tensor(count, device=DEVICE)
    ours = results(call(function, temperature, num_keys), inputs, dtype, [0])
    exact = results(
        lambda q, k, w: cross_entropy(q, k, w, temperature, num_keys), inputs, torch.float64, [0]
    )
    # Rounding a logit of size L moves a loss by about L ulp.
    size = (inputs[0].norm(dim=1) * inputs[2].abs()).sum() * inputs[1].norm(dim=1).max()
    size = size / temperature + inputs[2].abs().sum() * math.log(k + 1)
    assert (ours["output 0"] - exact["output 0"]).abs() <= tolerance * size
    slope = (1 + size) * inputs[1].norm(dim=1).max() / temperature
    assert (ours["gradient 0"] - exact["gradient 0"]).abs().max() <= tolerance * slope


@many_examples
@given(data=st.data())
def test_twin_property(data: st.DataObject) -> None:
    check_property(data, info_nce_eager, torch.float64, 1e-13)


def test_operator_is_well_registered() -> None:
    for case in ("empty bank", "growing bank"):
        (q, k, w), temperature, num_keys = make(case)
        q, k, w = q.float().requires_grad_(), k.float(), w.float()
        torch.library.opcheck(OP.default, (q, k, w, num_keys, temperature, True))
    backward = torch.ops.kiop_fast.info_nce_backward.default
    arguments = (torch.tensor(0.5), q.detach(), w, num_keys, len(k), temperature)
    torch.library.opcheck(backward, arguments)


def test_compiles_whole() -> None:
    inputs, *rest = make("growing bank")
    compiled = torch.compile(call(info_nce, *rest), fullgraph=True)
    plain = results(call(info_nce, *rest), inputs, torch.float64, [0])
    for name, value in results(compiled, inputs, torch.float64, [0]).items():
        torch.testing.assert_close(value, plain[name])


Q, K, W = torch.zeros(4, 8), torch.zeros(6, 8), torch.ones(4)


@pytest.mark.parametrize(
    ("queries", "keys", "weights", "temperature", "num_keys", "word"),
    [
        (Q[0], K, W, 1.0, None, "one width"),
        (Q, K[:, :7], W, 1.0, None, "one width"),
        (Q, K[:3], W, 1.0, None, "own key"),
        (Q[:0], K, W[:0], 1.0, None, "own key"),
        (Q[:, :0], K[:, :0], W, 1.0, None, "own key"),
        (Q, K, W[:3], 1.0, None, "one constant a query"),
        (Q, K, W.clone().requires_grad_(), 1.0, None, "one constant a query"),
        (Q, K, W, 0.0, None, "temperature"),
        (Q, K, W, math.inf, None, "temperature"),
        (Q.long(), K, W, 1.0, None, "floating point"),
        (Q, K.double(), W, 1.0, None, "share a dtype"),
        (Q, K.to("meta"), W, 1.0, None, "devices"),
        (Q, K, W, 1.0, torch.tensor([1, 2]), "one integer"),
        (Q, K, W, 1.0, torch.tensor(3.0), "one integer"),
        (Q, K, W, 1.0, torch.tensor(3, device="meta"), "devices"),
    ],
)
def test_bad_input(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    temperature: float,
    num_keys: Tensor | None,
    word: str,
) -> None:
    with pytest.raises(KernelError, match=word):
        info_nce(queries, keys, temperature, weights, num_keys=num_keys)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_twin(case: str, dtype: torch.dtype) -> None:
    inputs, temperature, num_keys = make(case)
    inputs = [x.to(dtype).double() for x in inputs]
    reset_launches()
    ours = results(call(info_nce, temperature, num_keys), inputs, dtype, [0])
    assert launches()["_info_nce_fwd_kernel"] == launches()["_info_nce_bwd_kernel"] == 1
    if case in ("many shares", "empty bank"):
        assert ("_info_nce_merge_kernel" in launches()) == (case == "many shares")
    exact = results(
        lambda q, k, w: cross_entropy(q, k, w, temperature, num_keys), inputs, torch.float64, [0]
    )
    eager = twin_in_other_orders(inputs, temperature, num_keys, dtype)
    scalar = {"output 0": exact.pop("output 0")}
    # The loss is fp32 whatever the embeddings are; the gradient has the embeddings' precision.
    assert_as_good_as_eager({"output 0": ours.pop("output 0")}, eager, scalar, torch.float32)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def twin_in_other_orders(
    inputs: list[Tensor], temperature: float, num_keys: Tensor | None, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """The twin's results with the embedding's coordinates in eight orders, put back."""
    queries, keys, weights = inputs
    runs = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(keys.shape[1], generator=generator).to(DEVICE)
        twin = call(info_nce_eager, temperature, num_keys)
        run = results(twin, [queries[:, order], keys[:, order], weights], dtype, [0])
        runs.append(run | {"gradient 0": run["gradient 0"][:, order.argsort()]})
    return runs


@runs_kernels
def test_kernel_takes_any_strides() -> None:
    (queries, keys, weights), *rest = make("odd")
    odd = [queries.T.contiguous().T, keys.repeat_interleave(2, 0)[::2], weights[:1].expand(43)]
    plain = [queries, keys, odd[2].contiguous()]
    expected = results(call(info_nce, *rest), plain, torch.float32, [0])
    for name, value in results(call(info_nce, *rest), odd, torch.float32, [0]).items():
        assert torch.equal(value, expected[name]), name


@runs_kernels
def test_kernel_ignores_what_does_not_count() -> None:
    check_ignored(info_nce, torch.float32)


@runs_kernels
def test_kernel_without_gradient_writes_no_direction() -> None:
    (queries, keys, weights), temperature, num_keys = make("many shares")
    queries, keys, weights = queries.float(), keys.float(), weights.float()
    reset_launches()
    loss = info_nce(queries, keys, temperature, weights, num_keys=num_keys)
    with_gradient = OP(queries, keys, weights, num_keys, temperature, True)
    assert OP(queries, keys, weights, num_keys, temperature, False)[1].numel() == 0
    torch.testing.assert_close(loss, with_gradient[0])
    assert "_info_nce_bwd_kernel" not in launches()


@runs_kernels
def test_kernel_extremes() -> None:
    check_extremes(info_nce, torch.float32)


@runs_kernels
@some_examples
@given(data=st.data())
def test_kernel_property(data: st.DataObject) -> None:
    check_property(data, info_nce, torch.float32, 1e-6)


@runs_kernels
def test_kernel_compiles_whole() -> None:
    inputs, *rest = make("growing bank")
    compiled = torch.compile(call(info_nce, *rest), fullgraph=True, backend="aot_eager")
    plain = results(call(info_nce, *rest), inputs, torch.float32, [0])
    reset_launches()
    for name, value in results(compiled, inputs, torch.float32, [0]).items():
        assert torch.equal(value, plain[name])
    assert launches()["_info_nce_fwd_kernel"] == launches()["_info_nce_bwd_kernel"] == 1
    q, k, w = (x.float() for x in inputs)
    torch.library.opcheck(OP.default, (q.requires_grad_(), k, w, rest[1], rest[0], True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replay_follows_a_growing_bank(dtype: torch.dtype) -> None:
    (queries, keys, weights), temperature, num_keys = make("growing bank")
    queries, keys = queries.to(dtype).requires_grad_(), keys.to(dtype)
    assert num_keys is not None

    def step() -> list[Tensor]:
        loss = info_nce(queries, keys, temperature, weights.float(), num_keys=num_keys)
        return [loss.detach(), *torch.autograd.grad(loss, queries)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for count in (77, 100, 170):
        num_keys.fill_(count)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
