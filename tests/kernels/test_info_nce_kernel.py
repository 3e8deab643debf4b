"""info_nce's Triton kernels against torch's cross-entropy; the twin's error is the yardstick."""

from __future__ import annotations

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
from oracle import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    capture,
    needs_gpu,
    results,
    runs_kernels,
    some_examples,
)
from torch import Tensor

from kiop_fast.kernels import info_nce, info_nce_eager, launches, reset_launches


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

    graph, captured = capture(step)
    for count in (77, 100, 170):
        num_keys.fill_(count)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
