"""mapped_kl's Triton kernels against the eager twin, whose own error is the yardstick."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapped_kl_cases import CASES, EDGES, OP, call, check_edge, check_property, make
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    capture,
    draw,
    needs_gpu,
    results,
    runs_kernels,
    some_examples,
)
from torch import Tensor

from kiop_fast.kernels import launches, mapped_kl, mapped_kl_eager, reset_launches


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

    graph, captured = capture(step)
    for leaf in leaves:
        leaf.data.copy_(draw(9, *leaf.shape))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
