"""Each operation, forward alone and with its backward, four ways."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import twins
from measure import Measure
from operations import LARGE, OPERATIONS, Operation
from oracle import assert_as_good_as_eager, at_dtype, draw, results
from sizes import Scale
from torch import Tensor

GPU = torch.cuda.is_available()
DTYPES = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if GPU else {})
PROVIDERS = ("reference", "eager", "compile", "fast")


def function_of(operation: Operation, provider: str) -> Callable[..., Any]:
    """The operation as one of the providers runs it."""
    if provider == "compile":
        made = torch.compile(operation.eager, fullgraph=True)

        def compiled(*inputs: Tensor) -> Any:
            with twins():
                return made(*inputs)

        return compiled
    chosen: Callable[..., Any] = getattr(operation, provider)
    return chosen


def check(operation: Operation, function: Callable[..., Any], dtype: torch.dtype) -> None:
    """At most twice as far from fp64 as eager's own runs at this precision (the tests' rule)."""
    inputs, places = [x.to(draw(0).device) for x in operation.inputs], operation.differentiable
    exact = results(operation.eager, inputs, torch.float64, places)
    eager = [
        results(other, inputs, dtype, places) for other in (operation.eager, operation.reference)
    ]
    assert_as_good_as_eager(results(function, inputs, dtype, places), eager, exact, dtype)


@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", [*OPERATIONS, *LARGE])
def test_kernel(
    name: str, precision: str, provider: str, passes: str, sizes: Scale, measure: Measure,
    once: Callable[..., Any], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    wanted = request.config.getoption("engines").split(",")
    if provider not in (*wanted, "eager"):
        pytest.skip("not among --engines")
    if name in LARGE and not (GPU and sizes.name == "paper"):
        pytest.skip("on a GPU at scale paper")
    operation = once(lambda: (OPERATIONS | LARGE)[name](sizes), "operation", name)
    backward = passes != "forward"
    if backward and not operation.differentiable:
        pytest.skip("bytes take no gradient")
    dtype, device = DTYPES[precision], measure.session.device
    function = function_of(operation, provider)
    if provider != "reference":
        check(operation, function, dtype)
    inputs = [at_dtype(x, dtype).to(device) for x in operation.inputs]
    leaves = [inputs[k].requires_grad_() for k in operation.differentiable]
    with torch.no_grad():
        found = function(*inputs)
    cotangents = [torch.randn_like(x) for x in ([found] if isinstance(found, Tensor) else found)]

    def call() -> Any:
        found = function(*inputs)
        if not backward:
            return found
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return torch.autograd.grad(outputs, leaves, cotangents)

    digest = hashlib.sha256(f"{name} {operation.sizes} {precision}".encode()).hexdigest()[:12]
    measure(
        call, group="kernels", stage=f"{name}, {passes}" + (f", {precision}" if GPU else ""),
        engine=provider, precision=precision, digest=digest, seconds=sizes.seconds, warm=3,
        capture=True, bytes_moved=operation.bytes_moved(dtype, backward=backward),
        flop=operation.flop or None, sizes=operation.sizes,
    )  # fmt: skip
