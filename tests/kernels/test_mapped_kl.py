"""mapped_kl and its eager twin against sums written out in fp64 and torch's own kl_div."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapped_kl_cases import CASES, EDGES, OP, call, check_edge, check_property, make
from oracle import draw, many_examples, results
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import mapped_kl, mapped_kl_eager


def written_out(
    logits: Tensor,
    target: Tensor,
    mapping: Tensor | None,
    temperature: float,
    only_agreeing: bool = False,
) -> tuple[Tensor, Tensor]:
    """T²/N Σ_i w_i Σ_j p_ij log(p_ij / q_ij), class by class."""
    mapped = logits if mapping is None else torch.stack([logits[:, c] for c in mapping], 1)
    p, q = (torch.softmax(x / temperature, 1) for x in (target, mapped))
    agrees = target.argmax(1) == mapped.argmax(1)
    rows = [F.kl_div(b.log(), a, reduction="sum") for a, b in zip(p, q, strict=True)]
    loss = logits.new_zeros(())
    for row, agreeing in zip(rows, agrees, strict=True):
        if agreeing or not only_agreeing:
            loss = loss + row
    return loss * temperature**2 / len(rows), agrees.sum()


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][2] <= 1000])
def test_twin_is_the_sum(case: str) -> None:
    inputs, *rest = make(case)
    ours = results(call(mapped_kl_eager, *rest), inputs, torch.float64, [0, 1])
    exact = results(lambda a, b: written_out(a, b, *rest), inputs, torch.float64, [0, 1])
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_operator_gradient_is_the_twins(case: str) -> None:
    """The hand-written backward in fp64, against autograd through the twin."""
    inputs, mapping, temperature, only_agreeing = make(case)

    def operator(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return OP(a, b, mapping, temperature, only_agreeing, mapping is not None)[:2]

    ours = results(operator, inputs, torch.float64, [0, 1])
    twin = call(mapped_kl_eager, mapping, temperature, only_agreeing)
    for name, value in results(twin, inputs, torch.float64, [0, 1]).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("edge", EDGES)
def test_twin_edges(edge: str) -> None:
    check_edge(mapped_kl_eager, edge, torch.float64)
    check_edge(mapped_kl_eager, edge, torch.float32)


@many_examples
@given(data=st.data())
def test_twin_property(data: st.DataObject) -> None:
    check_property(data, mapped_kl_eager, torch.float64)


def test_gradient_of_one_side_only() -> None:
    (logits, target), mapping, temperature, _ = make("repeats")
    both = results(call(mapped_kl_eager, mapping, temperature, False), [logits, target],
                   torch.float64, [0, 1])  # fmt: skip
    for side in (0, 1):
        leaves = [logits.clone(), target.clone()]
        leaves[side].requires_grad_()
        loss = OP(*leaves, mapping, temperature, False, side == 0)[0]
        (grad,) = torch.autograd.grad(loss, leaves[side : side + 1], draw(0))
        torch.testing.assert_close(grad, both[f"gradient {side}"])


def test_operator_is_well_registered() -> None:
    for case in ("43 to 10", "1000, identity"):
        inputs, mapping, temperature, only_agreeing = make(case)
        a, b = (x.float().requires_grad_() for x in inputs)
        invert = mapping is not None
        torch.library.opcheck(OP.default, (a, b, mapping, temperature, only_agreeing, invert))
    a, b = a.detach(), b.detach()
    rows, inverse = OP(a, b, mapping, 4.0, False, False)[2:]
    backward = torch.ops.kiop_fast.mapped_kl_backward.default
    grad = torch.tensor(0.3)
    torch.library.opcheck(backward, (grad, a, b, mapping, rows, inverse, 4.0, True, True))


def test_compiles_whole() -> None:
    inputs, *rest = make("43 to 10")
    compiled = torch.compile(call(mapped_kl, *rest), fullgraph=True)
    plain = results(call(mapped_kl, *rest), inputs, torch.float64, [0, 1])
    for name, value in results(compiled, inputs, torch.float64, [0, 1]).items():
        torch.testing.assert_close(value, plain[name])


A, B = torch.zeros(4, 10), torch.zeros(4, 3)
M = torch.tensor([0, 9, 4])


@pytest.mark.parametrize(
    ("logits", "target", "mapping", "temperature", "word"),
    [
        (A[0], B, M, 1.0, "two batches"),
        (A[:3], B, M, 1.0, "two batches"),
        (A[:0], B[:0], M, 1.0, "at least one row"),
        (A, B, None, 1.0, "equal classes"),
        (A, B, M[:2], 1.0, "bad mapping"),
        (A, B, M.int(), 1.0, "bad mapping"),
        (A, B, M + 1, 1.0, "out of range"),
        (A, B, M - 1, 1.0, "out of range"),
        (A, B, M, 0.0, "temperature"),
        (A, B, M, math.nan, "temperature"),
        (A.long(), B, M, 1.0, "floating point"),
        (A, B.to("meta"), M, 1.0, "devices"),
        (A, B, M.to("meta"), 1.0, "devices"),
    ],
)
def test_bad_input(
    logits: Tensor, target: Tensor, mapping: Tensor | None, temperature: float, word: str
) -> None:
    with pytest.raises(KernelError, match=word):
        mapped_kl(logits, target, mapping, temperature)
