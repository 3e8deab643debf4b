"""The doctor: each finding with its fix, the exit code, and estimates against known sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import tiny_source
from torch import nn
from typer.testing import CliRunner

from kiop_fast.cli import app
from kiop_fast.config import RunConfig
from kiop_fast.config_io import override
from kiop_fast.data import dali
from kiop_fast.doctor import machine_checks, plan_checks
from kiop_fast.doctor.plan import fixed_bytes, saved_bytes
from kiop_fast.presets import preset
from kiop_fast.source import build, freeze
from kiop_fast.sources import Sources

CPU = torch.device("cpu")


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = CliRunner().invoke(app, ["doctor", "--json", "--device", "cpu", *arguments])
    assert done.exit_code in (0, 1), done.output
    lines = [line for line in done.output.splitlines() if line.startswith("[{")]
    return done.exit_code, {check["name"]: check for check in json.loads(lines[0])}


def test_a_machine_without_gpu_is_well(tmp_path: Path) -> None:
    code, checks = doctor("--out", str(tmp_path / "runs" / "new"))
    assert code == 0
    assert set(checks) == {
        "python", "torch", "GPU", "Triton", "DALI", "graph capture", "timm", "memory", "disk",
    }  # fmt: skip
    assert torch.__version__ in checks["torch"]["found"]
    assert {check["state"] for check in checks.values()} <= {"pass", "note"}
    assert str(tmp_path) in checks["disk"]["found"]
    assert not (tmp_path / "runs").exists()
    if dali.available():
        assert "a pipeline ran on cpu" in checks["DALI"]["found"]
    if not torch.cuda.is_available():
        assert "no GPU to run it" in checks["Triton"]["found"]


def test_what_is_missing_comes_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali, "available", lambda: False)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 5e8}))
    checks = {check.name: check for check in machine_checks(CPU, tmp_path)}
    assert (checks["DALI"].state, checks["DALI"].fix) == ("note", dali.INSTALL)
    assert checks["disk"].state == "FAIL"
    assert "500.0 MB free" in checks["disk"].found


SMALL = ["prompt.rings=[20,24]", "side=16", "synthesis.batch=4", "synthesis.width=4",
         "synthesis.head_width=8", "storing.batch=4"]  # fmt: skip


def test_a_run_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in tasks whose models are not there yet; nothing is trained or written."""
    monkeypatch.setenv("KIOP_FAST_CACHE", str(tmp_path / "cache"))
    code, checks = doctor("--preset", "demo", *SMALL)
    assert code == 0, checks
    assert "26 classes" in checks["target"]["found"]
    assert "is trained first" in checks["target"]["found"]
    assert "9 layers, features 336 wide" in checks["provider 1: BatchNorm"]["found"]
    assert "360 test images" in checks["provider 1: data"]["found"]
    assert "5 synthesize calls, 252 steps" in checks["time of the run"]["found"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "name", "found", "fix"),
    [
        (["--target", "resnet8@digits", "--provider", "resnet8@letters"], "mapping",
         "10 classes", ""),
        (["--target", "resnet8@letters=nowhere.pth"], "target", "nowhere.pth", "check the path"),
        (["--target", "resnet8@leters"], "target", "unknown dataset", "did you mean letters"),
        (["prompt.rings=[12]"], "settings", "first ring is not larger", "set prompt.rings"),
        (["--target", "resnet18@cifar100"], "target", "no weights", "kiop-fast pretrain"),
        (["synthesis.head_width=2000000"], "memory of the run", "projection heads",
         "synthesis.head_width=256"),
    ],
    ids=["classes", "file", "name", "rings", "weights", "memory"],
)  # fmt: skip
def test_a_run_that_would_not(
    arguments: list[str], name: str, found: str, fix: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("KIOP_FAST_CACHE", str(tmp_path))
    given = {text.partition("=")[0] for text in arguments}
    small = [text for text in SMALL if text.partition("=")[0] not in given]
    code, checks = doctor("--preset", "demo", *small, *arguments)
    assert code == 1
    assert checks[name]["state"] == "FAIL"
    assert found in checks[name]["found"]
    assert fix in checks[name]["fix"]


def test_missing_data_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path))
    torch.save(build("resnet8", 10, 16).state_dict(), tmp_path / "w.pth")
    arguments = ["--preset", "demo", "--target", f"resnet8@cifar10={tmp_path / 'w.pth'}", *SMALL]
    code, checks = doctor(*arguments)
    assert code == 1
    assert checks["target: data"]["state"] == "FAIL"
    assert "download('cifar10')" in checks["target: data"]["fix"]
    assert checks["target"]["state"] == "note"  # 32 pixels, the run 16
    assert doctor(*arguments, "evaluation.every=0")[0] == 0


def test_the_paper_setting_of_resnet50_needs_twenty_gigabytes() -> None:
    """26,560 channels pass its BatchNorm layers; head and bank of one model alone:
    4 copies of 26,560² + 26,560 · 256 weights, and 6,400 (or 40,960) rows of 2 · 26,560."""
    with torch.device("meta"):
        model = build_resnet50()
    target = freeze_without_weights(model)
    config = override(preset("paper-bf"), {"providers": [], "target": "resnet50@cifar100"})
    held = fixed_bytes(config, Sources(target, ()))
    width = 26_560
    head = (width + 1) * width + (width + 1) * 256
    assert held["projection heads"] == 16 * head
    assert held["feature banks"] == 4 * 2 * width * 6400
    full = override(config, {"epochs": 640})
    everything = sum(fixed_bytes(full, Sources(target, ())).values())
    assert 20e9 < everything < 21e9


def test_offloaded_tasks_take_the_room_of_the_largest() -> None:
    sources = Sources(tiny_source("target", 7, 1), (tiny_source("one", 4, 2),) * 2)
    config = override(preset("paper-bf"), {"epochs": 3})
    each, shared = (fixed_bytes(config, sources, offload=offload) for offload in (False, True))
    for part in ("projection heads", "feature banks"):
        assert shared[part] == each[part] / 3 > 0  # all three have the same width
    assert shared["models"] == each["models"]


def build_resnet50() -> nn.Module:
    from torchvision import models

    return models.resnet50(weights=None, num_classes=100)


def freeze_without_weights(model: nn.Module) -> Any:
    from kiop_fast.data import dataset
    from kiop_fast.source import Source

    return Source("resnet50@cifar100", "resnet50", model, dataset("cifar100").info, "0" * 64)


def test_saved_bytes_counts_what_backward_needs() -> None:
    """A ReLU keeps its output, a linear layer its input and its weight."""
    layer = nn.Linear(10, 7, bias=False).requires_grad_(False)
    x = torch.randn(3, 10, requires_grad=True)
    assert saved_bytes(lambda: torch.relu(x)) == 4 * 30
    assert saved_bytes(lambda: layer(x)) == 4 * 70


def test_no_target() -> None:
    checks = plan_checks(RunConfig(), CPU)
    assert [(c.name, c.state) for c in checks] == [("settings", "pass"), ("target", "FAIL")]


def test_the_table_is_printed() -> None:
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0
    assert "looked at" in done.output
    assert "pass" in done.output


def test_frozen_models_stay_frozen() -> None:
    """The doctor's looks do not touch a model."""
    from kiop_fast.data import dataset

    source = freeze(build("resnet8", 10, 16), dataset("digits").info, name="x", arch="resnet8")
    saved_bytes(lambda: source.model(torch.zeros(1, 3, 16, 16, requires_grad=True)))
    source.check_unchanged()
