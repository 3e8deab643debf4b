"""mapped_kl against sums written out in fp64 and torch's own kl_div."""

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
from kiop_fast.kernels import launches, mapped_kl, mapped_kl_eager, reset_launches

OP = torch.ops.kiop_fast.mapped_kl
MAPPED_KL = Callable[..., tuple[Tensor, Tensor]]

# name: rows, classes of logits, classes of the target, mapping, temperature, only_agreeing
CASES: dict[str, tuple[int, int, int, str, float, bool]] = {
    "power of two": (8, 64, 16, "injective", 4.0, False),
    "43 to 10": (5, 43, 10, "injective", 20.0, False),
    "100 to 43, agreeing": (64, 100, 43, "injective", 1.0, True),
    "1000, identity": (3, 1000, 1000, "identity", 20.0, False),
    "1000 classes": (3, 1000, 1000, "injective", 4.0, True),
    "repeats": (7, 10, 100, "any", 4.0, False),
    "all from one class": (4, 10, 43, "one", 2.0, False),
    "one row, two classes": (1, 2, 2, "identity", 1.0, True),
    "several programs": (40, 100, 100, "any", 4.0, True),
    "beyond a block": (3, 9001, 8500, "injective", 4.0, False),
    "as many classes as it takes": (3, 16384, 16384, "injective", 20.0, True),
}


def make(case: str) -> tuple[list[Tensor], Tensor | None, float, bool]:
    """[logits, target_logits] in fp64, mapping, temperature, only_agreeing."""
    rows, ka, kb, kind, temperature, only_agreeing = CASES[case]
    generator = torch.Generator().manual_seed(ka * kb)
    mapping = {
        "identity": lambda: None,
        "injective": lambda: torch.randperm(ka, generator=generator)[:kb],
        "any": lambda: torch.randint(ka, (kb,), generator=generator),
        "one": lambda: torch.full((kb,), ka - 1),
    }[kind]()
    logits, target = 3 * draw(1, rows, ka), 3 * draw(2, rows, kb)
    mapping = None if mapping is None else mapping.to(DEVICE)
    # Every other row agrees, so that only_agreeing has something to count and something to drop.
    own = logits if mapping is None else logits[:, mapping]
    target[::2] = own[::2] + draw(3, rows, kb)[::2] / 2
    if kb > 8192:
        # Arg-maxima beyond the kernel's first block: equal in rows 0 and 2, a block apart in row 1.
        logits[[0, 2], mapping[8300]] = target[[0, 2], 8300] = 60
        logits[1, mapping[8]] = target[1, 8200] = 60
    return [logits, target], mapping, temperature, only_agreeing


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


def call(
    function: MAPPED_KL, mapping: Tensor | None, temperature: float, only_agreeing: bool
) -> Callable[[Tensor, Tensor], Any]:
    return lambda a, b: function(a, b, mapping, temperature, only_agreeing=only_agreeing)


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


INF = math.inf
# name: logits, target_logits, loss (T = 1), agreement
EDGES: dict[str, tuple[list[float], list[float], float, int]] = {
    "all equal": ([5.0] * 4, [-3.0] * 4, 0.0, 1),
    "huge": ([3e4, 0, 0, 0], [3e4, 0, -3e4, 0], 0.0, 1),
    "both masked": ([1, 1, -INF, -INF], [2, 2, -INF, -INF], 0.0, 1),
    "target masked": ([0, 0, 0, 0], [7, 7, -INF, -INF], math.log(2), 1),
    "one class left": ([0, -INF, -INF, -INF], [0, -INF, -INF, -INF], 0.0, 1),
    "certain and wrong": ([0, 100, -INF, 0], [100, 0, -INF, 0], 100.0, 0),
    "impossible class": ([-INF, 0, 0, 0], [0, -INF, -INF, -INF], INF, 0),
}


def check_edge(function: MAPPED_KL, edge: str, dtype: torch.dtype) -> None:
    logits, target, loss, agreement = EDGES[edge]
    leaves = [
        torch.tensor([x, x], dtype=dtype, device=DEVICE, requires_grad=True)
        for x in (logits, target)
    ]
    found = function(*leaves, None, 1.0)
    expected = torch.tensor(loss, device=DEVICE, dtype=found[0].dtype)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert found[1].item() == 2 * agreement
    if math.isfinite(loss):
        for grad in torch.autograd.grad(found[0], leaves):
            assert grad.isfinite().all()
            torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("edge", EDGES)
def test_twin_edges(edge: str) -> None:
    check_edge(mapped_kl_eager, edge, torch.float64)
    check_edge(mapped_kl_eager, edge, torch.float32)


def check_property(data: st.DataObject, function: MAPPED_KL, dtype: torch.dtype) -> None:
    """Finite and the written-out sum, for any shapes, mapping and finite or masked logits."""
    rows, ka, kb = (data.draw(st.integers(low, top)) for low, top in ((1, 9), (2, 40), (2, 40)))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 4.0, 20.0]))
    mapping = data.draw(st.lists(st.integers(0, ka - 1), min_size=kb, max_size=kb))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    seed = data.draw(st.integers(0, 999))
    logits = draw(seed, rows, ka) * scale + data.draw(st.sampled_from([0.0, 1e3]))
    target = draw(seed + 1, rows, kb) * scale
    masked = data.draw(st.sets(st.integers(0, kb - 2), max_size=kb - 2))
    target[:, list(masked)] = -INF
    inputs = [logits.to(dtype), target.to(dtype)]
    wanted = torch.tensor(mapping, device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, agreement = function(*leaves, wanted, temperature)
    grads = torch.autograd.grad(loss, leaves)

    own = inputs[0].double()[:, wanted]
    log_q, log_p = (torch.log_softmax(x.double() / temperature, 1) for x in (own, inputs[1]))
    terms = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0)
    exact = terms.sum() * temperature**2 / rows
    size = terms.abs().sum() * temperature**2 / rows + temperature**2
    assert (loss.double() - exact).abs() <= 1e-5 * size
    assert agreement.item() == (own.argmax(1) == inputs[1].argmax(1)).sum().item()
    for grad in grads:
        assert grad.isfinite().all()
        assert grad.double().sum(1).abs().max() <= 1e-4 * (1 + grad.abs().max())


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


def twin_in_other_orders(case: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The twin's results with the target's classes in eight orders, put back into the first."""
    (logits, target), mapping, temperature, only_agreeing = make(case)
    identity = torch.arange(target.shape[1], device=DEVICE)
    runs = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(identity), generator=generator).to(DEVICE)
        shuffled = (identity if mapping is None else mapping)[order]
        twin = call(mapped_kl_eager, shuffled, temperature, only_agreeing)
        run = results(twin, [logits, target[:, order]], dtype, [0, 1])
        runs.append(run | {"gradient 1": run["gradient 1"][:, order.argsort()]})
    return runs


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_twin(case: str, dtype: torch.dtype) -> None:
    inputs, *rest = make(case)
    reset_launches()
    ours = results(call(mapped_kl, *rest), inputs, dtype, [0, 1])
    assert launches()["_mapped_kl_fwd_kernel"] == launches()["_mapped_kl_bwd_kernel"] == 1
    exact_inputs = [x.to(dtype).double() for x in inputs]
    exact = results(call(mapped_kl_eager, *rest), exact_inputs, torch.float64, [0, 1])
    eager = twin_in_other_orders(case, dtype)
    scalar = {"output 0": exact.pop("output 0")}
    # The loss is fp32 whatever the logits are; the gradients have the logits' precision.
    assert_as_good_as_eager({"output 0": ours.pop("output 0")}, eager, scalar, torch.float32)
    assert_as_good_as_eager(ours, eager, exact, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_takes_any_strides(dtype: torch.dtype) -> None:
    inputs, *rest = make("several programs")
    odd = [x.T.contiguous().T if k else x.repeat_interleave(2, 1)[:, ::2]
           for k, x in enumerate(inputs)]  # fmt: skip
    plain = results(call(mapped_kl, *rest), inputs, dtype, [0, 1])
    mapping = rest[0].repeat_interleave(2)[::2]  # type: ignore[union-attr]
    assert not mapping.is_contiguous()
    for name, value in results(call(mapped_kl, mapping, *rest[1:]), odd, dtype, [0, 1]).items():
        assert torch.equal(value, plain[name]), name


@runs_kernels
@pytest.mark.parametrize("edge", EDGES)
def test_kernel_edges(edge: str) -> None:
    check_edge(mapped_kl, edge, torch.float32)


@runs_kernels
@some_examples
@given(data=st.data())
def test_kernel_property(data: st.DataObject) -> None:
    check_property(data, mapped_kl, torch.float32)


@runs_kernels
def test_kernel_one_side_only_and_other_dtypes() -> None:
    (logits, target), mapping, temperature, only_agreeing = make("repeats")
    logits, target = logits.half().requires_grad_(), target.float()
    reset_launches()
    loss, _ = mapped_kl(logits, target, mapping, temperature, only_agreeing=only_agreeing)
    loss.backward()
    twin = logits.detach().float().requires_grad_()
    mapped_kl_eager(twin, target, mapping, temperature)[0].backward()
    assert loss.dtype is torch.float32
    assert logits.grad.dtype is torch.float16
    torch.testing.assert_close(logits.grad.float(), twin.grad, rtol=2**-9, atol=1e-6)
    with torch.no_grad():
        mapped_kl(logits, target, mapping, temperature)
    assert launches()["_mapped_kl_bwd_kernel"] == 1


@runs_kernels
def test_kernel_never_reads_through_a_bad_index() -> None:
    logits, target = draw(1, 3, 10).float(), draw(2, 3, 4).float()
    for bad in (10, -1, 2**40):
        mapping = torch.tensor([0, bad, 1, 2], device=DEVICE)
        assert OP(logits, target, mapping, 1.0, True, True)[0].isnan()


@runs_kernels
def test_kernel_compiles_whole() -> None:
    inputs, *rest = make("43 to 10")
    compiled = torch.compile(call(mapped_kl, *rest), fullgraph=True, backend="aot_eager")
    plain = results(call(mapped_kl, *rest), inputs, torch.float32, [0, 1])
    reset_launches()
    for name, value in results(compiled, inputs, torch.float32, [0, 1]).items():
        assert torch.equal(value, plain[name])
    assert launches() == {"_mapped_kl_fwd_kernel": 1, "_mapped_kl_bwd_kernel": 1}
    a, b = (x.float().requires_grad_() for x in inputs)
    torch.library.opcheck(OP.default, (a, b, *rest, True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", ["43 to 10", "several programs", "1000, identity"])
def test_graph_replay_equals_eager(case: str) -> None:
    inputs, *rest = make(case)
    leaves = [x.float().requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        loss, agreement = call(mapped_kl, *rest)(*leaves)
        return [loss.detach(), agreement, *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for leaf in leaves:
        leaf.data.copy_(draw(9, *leaf.shape))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
