"""One tiny epoch of the fast engine launches every Triton kernel, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import DEVICE, runs_kernels
from stand_ins import tiny_source

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override
from kiop_fast.kernels import dispatch, launches, reset_launches
from kiop_fast.pipeline import train
from kiop_fast.prompt.artefact import load_prompt
from kiop_fast.sources import Sources

BOTH_WAYS = ("prompt_pad", "mapped_kl", "info_nce", "bn_match", "views")
WANTED = {f"_{op}_{way}_kernel" for op in BOTH_WAYS for way in ("fwd", "bwd")}
WANTED |= {"_bank_replay_kernel"}  # bytes take no gradient

# Two calls a task: the second one finds cached rows in the feature bank.
EPOCH = {
    "side": 8,
    "epochs": 1,
    "threads": 1,
    "device": DEVICE,
    "prompt": {"rings": [11, 12], "mapping": "iterative", "calibration_batch": 4},
    "synthesis": {"batch": 4, "calls": 2, "steps": 2, "latent": 8, "width": 4, "head_width": 8,
                  "head_dim": 16, "pad": 1},
    "storing": {"steps": 2, "batch": 4, "pad": 1, "flip": 0.5, "augment_as_dataset": False},
    "evaluation": {"every": 0},
}  # fmt: skip


@runs_kernels
def test_kernel_launches_of_one_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    sources = Sources(tiny_source("target", 7, 1), (tiny_source("provider", 4, 2),))
    for source in (sources.target, *sources.providers):
        source.model.to(DEVICE)
    reset_launches()
    result = train(override(RunConfig(), EPOCH), tmp_path / "run", sources=sources)
    counted = launches()
    print(counted)
    assert not WANTED - counted.keys(), counted
    assert set(result.metrics[0]["loss"]) >= {"target.total", "provider.total", "provider.kl"}
    cells = load_prompt(tmp_path / "run" / "prompt.safetensors").cells
    assert all(ring.any() and ring.isfinite().all() for ring in cells)
