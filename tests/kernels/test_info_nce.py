"""info_nce and its eager twin against torch's cross-entropy over the whole table of logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from info_nce_cases import (
    CASES,
    OP,
    call,
    check_extremes,
    check_ignored,
    check_property,
    cross_entropy,
    make,
)
from oracle import many_examples, results
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import info_nce, info_nce_eager


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


def test_twin_ignores_what_does_not_count() -> None:
    check_ignored(info_nce_eager, torch.float64)


def test_twin_extremes() -> None:
    check_extremes(info_nce_eager, torch.float64)
    check_extremes(info_nce_eager, torch.float32)


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
