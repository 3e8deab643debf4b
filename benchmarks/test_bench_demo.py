"""The demo end to end: shortened for both engines, or whole, for time to accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measure import Measure
from sizes import Scale
from tolerances import ENGINES

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override
from kiop_fast.pipeline import train
from kiop_fast.presets import preset
from kiop_fast.sources import Sources, load_sources

SEEDS = (0, 1, 2)  # of time to accuracy


def demo(engine: str, changes: dict[str, Any], measure: Measure) -> tuple[RunConfig, Sources]:
    """The demo's settings and its models, trained once and cached."""
    device = measure.session.device
    config = override(preset("demo"), {"engine": engine, "device": device.type, **changes})
    rings = config.prompt.rings
    return config, load_sources(config, rings, device, None)


def first_losses(engine: str, measure: Measure, folder: Path) -> dict[str, float]:
    """Losses of a demo of one step a period: later steps amplify rounding (gates.STEPS)."""
    short = {"epochs": 1, "evaluation": {"every": 0}, "synthesis": {"steps": 1, "batch": 64},
             "storing": {"steps": 1}}  # fmt: skip
    config, sources = demo(engine, short, measure)
    losses: dict[str, float] = train(config, folder, sources=sources).metrics[0]["loss"]
    return losses


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize(
    ("length", "seed"), [("shortened", 0), *(("whole", seed) for seed in SEEDS)]
)
def test_demo(
    length: str, seed: int, engine: str, sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if engine not in request.config.getoption("engines").split(","):
        pytest.skip("not among --engines")
    if length == "whole" and not request.config.getoption("whole_demo"):
        pytest.skip("only with --whole-demo")
    expected = once(lambda: first_losses("reference", measure, tmp_path / "expected"), "demo")
    found = first_losses(engine, measure, tmp_path / "first")
    for name, value in expected.items():
        size = max(abs(value), 1e-3)
        assert abs(found[name] - value) <= ENGINES["fp32"] * size, f"{name}: {found[name]}, {value}"
    changes = sizes.demo if length == "shortened" else {"seed": seed}
    config, sources = demo(engine, changes, measure)
    runs: list[Any] = []

    def run() -> None:
        runs.append(train(config, tmp_path / f"run{len(runs)}", sources=sources))

    row = measure(
        run, group="demo", stage=f"{length} demo, seed {seed}", engine=engine, precision="fp32",
        digest=override(config, {"engine": "reference"}).digest()[:12], rounds=1, warm=0,
        memory=False,
    )  # fmt: skip
    last = runs[-1]
    timings = [json.loads(line) for line in (last.out / "timings.jsonl").read_text().splitlines()]
    curve = [
        {"seconds": sum(t["seconds"] for t in timings[: k + 1]), "accuracy": m["accuracy"]}
        for k, m in enumerate(last.metrics)
        if "accuracy" in m
    ]
    measure.session.write(
        {"kind": "accuracy", "stage": row["stage"], "engine": engine, "length": length,
         "seed": seed, "accuracy": last.accuracy, "curve": curve}
    )  # fmt: skip
