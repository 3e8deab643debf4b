"""Precision of a step: what each setting computes with, and that torch's flags come back."""

from __future__ import annotations

import pytest
import torch
from small_periods import parts
from stand_ins import wave
from tolerances import ABSOLUTE, ENGINES

from kiop_fast.config import PromptConfig, RunConfig
from kiop_fast.engine import engine
from kiop_fast.errors import ConfigError
from kiop_fast.runtime.execution import AS_SET, PLAIN, Execution
from kiop_fast.runtime.linear import linear, split_product

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_half_precision_stays_near_single() -> None:
    """bf16 has 8 bits: losses of the first step agree to a few parts in a hundred."""
    single = parts(CPU)[3](0).losses[0]
    half = parts(CPU, execution=Execution("bf16"))[3](0).losses[0]
    assert half.dtype == torch.float32
    assert not torch.equal(single, half)
    torch.testing.assert_close(
        half[[0, 1, 3, 4]], single[[0, 1, 3, 4]], rtol=ENGINES["bf16"], atol=ABSOLUTE["bf16"]
    )


def test_three_bf16_products_are_nearly_fp32() -> None:
    """Each factor keeps 16 bits, so a sum errs by at most 3 · 2⁻¹⁷ of its terms' magnitudes."""
    x, w, b = wave(40, 70, pace=0.7), wave(30, 70, pace=1.3), wave(30)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    cotangent = wave(40, 30, pace=0.3)
    ours = linear(*inputs, product=split_product)
    gradients = torch.autograd.grad(ours, inputs, cotangent)
    x, w, b, g = (t.double() for t in (x, w, b, cotangent))
    for found, exact, size in (
        (ours, x @ w.T + b, x.abs() @ w.abs().T),
        (gradients[0], g @ w, g.abs() @ w.abs()),
        (gradients[1], g.T @ x, g.abs().T @ x.abs()),
    ):
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= size * 3 * 2**-17 + 1e-6).all()
    torch.testing.assert_close(gradients[2], g.sum(0).float())
    rough = x.bfloat16() @ w.T.bfloat16() + b.bfloat16()
    assert (rough - x @ w.T - b).abs().max() > 30 * (ours - x @ w.T - b).abs().max()


def test_the_head_takes_three_products_when_asked() -> None:
    single = parts(CPU)[3](0).losses
    split = parts(CPU, execution=Execution("bf16x3"))[3](0).losses
    assert not torch.equal(single, split)
    torch.testing.assert_close(split[0], single[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_has_no_part_in_a_period(precision: str) -> None:
    execution = Execution(precision)
    expected = parts(CPU, execution=execution)[3](0).losses
    with torch.autocast("cpu", torch.bfloat16):
        found = parts(CPU, execution=execution)[3](0).losses
    assert torch.equal(found, expected)


def test_precision_that_the_device_lacks() -> None:
    with pytest.raises(ConfigError, match="lacks the precision asked for") as error:
        engine("fast").execution(RunConfig(precision="tf32"), CPU)
    assert "tf32 on cpu" in str(error.value)
    assert "one of fp32, bf16" in str(error.value)
    with pytest.raises(ConfigError, match="precision"):
        RunConfig(precision="fp16")
    with pytest.raises(ConfigError, match="reference engine"):
        RunConfig(engine="reference", precision="bf16")


@pytest.mark.parametrize("outside", ["highest", "high"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3", "bf16"])
def test_products_are_tf32_where_asked_and_only_there(precision: str, outside: str) -> None:
    """Also by the old names of torch's flags, which refuse to answer where old and new differ."""

    def flags() -> tuple[str, bool, bool]:
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        return torch.get_float32_matmul_precision(), products.allow_tf32, convolutions.allow_tf32

    before = flags()
    torch.set_float32_matmul_precision(outside)
    try:
        around = flags()
        with Execution(precision).products(CUDA):
            tf32 = precision == "tf32"
            assert flags() == ("high" if tf32 else "highest", tf32, tf32)
        assert flags() == around
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_steps_search_for_algorithms_and_leave_the_flags_as_they_were() -> None:
    cudnn = torch.backends.cudnn
    assert not cudnn.benchmark
    with PLAIN.products(CUDA):
        assert not cudnn.benchmark
    with PLAIN.products(CUDA, search=True):
        assert cudnn.benchmark
    assert not cudnn.benchmark
    cudnn.deterministic = True
    try:
        with PLAIN.products(CUDA, search=True):
            assert not cudnn.benchmark
    finally:
        cudnn.deterministic = False


@pytest.mark.parametrize("allowed", [True, False])
def test_flags_as_set_stay_as_set(allowed: bool) -> None:
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = allowed
    try:
        with Execution(AS_SET).products(CUDA, search=True):
            assert cudnn.allow_tf32 == allowed
    finally:
        cudnn.allow_tf32 = before


def test_dropout_that_stays_on_rules_graphs_out() -> None:
    assert engine("fast").execution(RunConfig(), CPU)["execution"].graphs
    upstream = RunConfig(prompt=PromptConfig(dropout=True))
    assert not engine("fast").execution(upstream, CPU)["execution"].graphs
    assert engine("reference").execution(RunConfig(engine="reference"), CPU) == {}
