"""Time and memory as one size grows: batch, canvas, negatives, providers.

Runs with ``--sweep``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import gates
import pytest
from measure import Measure
from sizes import Problem, Scale
from test_bench_steps import extra_warmth, prompt_step
from world import World

POINTS = {
    "batch": (16, 64, 128, 256, 512),
    "canvas": (64, 96, 128, 160, 224),
    "negatives": (0, 256, 1024, 4096, 16384),
    "providers": (1, 2, 3, 4),
}
SWEEPERS = ("reference", "fast")


def problem_at(sizes: Scale, axis: str, point: int) -> Problem:
    """The scale's problem with one size changed."""
    steps = sizes.problem.config.synthesis.steps
    base = sizes.problem.with_(
        cached=256, bank=max(512, point if axis == "batch" else 0), storing={"steps": steps}
    )
    if axis == "batch":
        return base.with_(synthesis={"batch": point}, storing={"batch": point})
    if axis == "canvas":
        return base.with_(prompt={"rings": [base.config.prompt.rings[0], point]})
    if axis == "negatives":
        return base.with_(cached=point, bank=1, synthesis={"negatives": max(point, 1)})
    from dataclasses import replace

    inner, outer = base.config.prompt.rings
    rings = [inner, *(outer + 8 * k for k in range(point))]
    classes = (base.classes[0], *[base.classes[1]] * point)
    return replace(base.with_(cached=0, prompt={"rings": rings}), classes=classes)


@pytest.mark.parametrize("engine", SWEEPERS)
@pytest.mark.parametrize(
    ("axis", "point"), [(axis, point) for axis, points in POINTS.items() for point in points]
)
def test_scaling(
    axis: str, point: int, engine: str, sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if engine not in request.config.getoption("engines").split(","):
        pytest.skip("not among --engines")
    if not request.config.getoption("sweep"):
        pytest.skip("only with --sweep")
    problem, device = problem_at(sizes, axis, point), measure.session.device
    stage = f"{axis} {point}"
    where = {"axis": axis, "point": point}
    precision = "fp32"
    if axis in ("canvas", "providers"):
        prompt_step(problem, stage, (engine, precision), sizes, measure, once, tmp_path,
                    group="scaling", **where)  # fmt: skip
        return

    def world(name: str) -> World:
        return World(problem, engines.make(name), device, tmp_path / name, ("A",))

    with engines.running_at(precision):
        expected = once(lambda: world("reference").synthesizing("A")(), "scaling", problem.digest())
        made = world(engine)
        gates.check_synthesis(made.synthesizing("A")(), expected, precision)
        measure(
            made.stepping("A"), setup=lambda: made.rewind("A"), group="scaling", stage=stage,
            engine=engine, precision=precision, digest=problem.digest(),
            per=problem.config.synthesis.steps, rounds=2, warm=extra_warmth(engine, device),
            **where,
        )  # fmt: skip
