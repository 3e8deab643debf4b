"""Which backend runs, and that nothing falls back in silence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import DEVICE, ON_GPU, runs_kernels
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import (
    bank_replay,
    bn_match,
    dispatch,
    info_nce,
    launches,
    mapped_kl,
    prompt_pad,
    reset_launches,
    views,
)


def one_of_each(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Tensor]]:
    """A tiny call of each operation."""
    x = torch.ones(2, 4, dtype=dtype, device=DEVICE)
    image, cells, one = x.new_ones(1, 1, 2, 2), x.new_ones(1, 5), x.new_ones(1)
    row, still = torch.zeros(1, dtype=torch.int64, device=DEVICE), one < 0
    crop, box = row.new_zeros(1, 2), torch.tensor([[0, 0, 2, 2]], device=DEVICE)
    return {
        "prompt_pad": lambda: prompt_pad(image, [cells], [3]),
        "mapped_kl": lambda: mapped_kl(x, x).loss,
        "info_nce": lambda: info_nce(x, x, 1.0, x[:, 0]),
        "bn_match": lambda: bn_match(image, one, one, None, None, 1e-5).output,
        "views": lambda: views(image, crop, still, box, still, pad=0, mean=one, std=one),
        "bank_replay": lambda: bank_replay(image.byte(), row, mean=one, std=one, dtype=dtype),
    }


# A call's launches, where it is not one of ``_{operation}_fwd_kernel``.
LAUNCHES = {
    "bn_match": {"_bn_match_fwd_kernel": 1, "_bn_match_loss_kernel": 1},
    "bank_replay": {"_bank_replay_kernel": 1},
}


@pytest.mark.parametrize("op", one_of_each())
@pytest.mark.parametrize("request_", [None, "auto", "torch"])
def test_twins_on_a_cpu(op: str, request_: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if request_ is None:
        monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(dispatch.VARIABLE, request_)
    reset_launches()
    assert one_of_each()[op]().isfinite().all()
    assert bool(launches()) == (ON_GPU and request_ != "torch")


@pytest.mark.parametrize("op", one_of_each())
def test_unknown_request(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "tritn")
    with pytest.raises(KernelError, match="did you mean triton"):
        one_of_each()[op]()


@pytest.mark.skipif(ON_GPU or dispatch.INTERPRETED, reason="here Triton can be honoured")
@pytest.mark.parametrize("op", one_of_each())
def test_impossible_request(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(KernelError, match=rf"cannot be honoured for {op}[\s\S]*TRITON_INTERPRET"):
        one_of_each()[op]()


def test_kernels_import_and_run_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
import kiop_fast.kernels as kernels
x = torch.ones(2, 4)
assert kernels.info_nce(x, x, 1.0, x[:, 0]) > 0
assert kernels.mapped_kl(x, x).agreement == 2
assert kernels.prompt_pad(torch.ones(1, 1, 2, 2), [torch.ones(1, 5)], [3]).shape == (1, 1, 3, 3)
import os
os.environ["KIOP_FAST_KERNELS"] = "triton"
try:
    kernels.mapped_kl(x, x)
except kernels.dispatch.KernelError as error:
    assert "no Triton installed" in str(error)
else:
    raise AssertionError("triton was requested, and nobody said it is missing")
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=120)


@runs_kernels
@pytest.mark.parametrize("op", one_of_each())
def test_kernel_request_is_honoured(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    reset_launches()
    one_of_each()[op]()
    assert launches() == LAUNCHES.get(op, {f"_{op}_fwd_kernel": 1})
    reset_launches()
    assert launches() == {}


@runs_kernels
def test_kernel_cannot_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 20_000, device=DEVICE)
    doubles = one_of_each(torch.float64).values()
    too_much = [lambda: mapped_kl(x, x).loss, lambda: info_nce(x, x, 1.0, x[:, 0])]
    for call in [*doubles, *too_much]:
        monkeypatch.setenv(dispatch.VARIABLE, "triton")
        with pytest.raises(KernelError, match="cannot take these arguments"):
            call()
        monkeypatch.setenv(dispatch.VARIABLE, "auto")
        reset_launches()
        assert call().isfinite().all()
        assert launches() == {}


def test_devices_and_dtypes_are_named() -> None:
    a, b = torch.ones(1), torch.ones(1, device="meta")
    with pytest.raises(KernelError, match="a on cpu, b on meta"):
        dispatch.require_same_device("op", a=a, b=b, c=None)
    with pytest.raises(KernelError, match=r"b torch\.int64"):
        dispatch.require_floating("op", a=a, b=a.long())
    assert dispatch.accumulation_dtype(a.half(), a.bfloat16()) is torch.float32
    assert dispatch.accumulation_dtype(a.half(), a.double()) is torch.float64
