"""The authors' unmodified functions in the same process, on the same problem (``--upstream``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engines
import gates
import pytest
from measure import Measure
from sizes import Problem, Scale
from test_bench_steps import CACHED, skip_unless_at
from upstream import Unavailable, Upstream, load

NOT_GIVEN = "no checkout of the authors' code was named: --upstream PATH"


@pytest.fixture
def precision(request: pytest.FixtureRequest, measure: Measure) -> Iterator[str]:
    """As torch starts: what the authors' code runs at."""
    if "upstream" not in request.config.getoption("engines").split(","):
        pytest.skip("not among --engines")
    name = "default" if measure.session.device.type == "cuda" else "fp32"
    with engines.running_at(name):
        yield name


def opened(
    problem: Problem, stage: str, measure: Measure, folder: Path, request: pytest.FixtureRequest
) -> Upstream:
    """The problem in the authors' hands; skips with a message where that cannot be."""
    path = request.config.getoption("upstream")
    if path is None:
        measure.unavailable(stage, "upstream", NOT_GIVEN)
    try:
        return Upstream(load(path.resolve()), problem, measure.session.device, folder)
    except Unavailable as error:
        measure.unavailable(stage, "upstream", str(error))
        raise


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("task", ["B", "A"])
def test_synthesis_step(
    task: str, cached: int, precision: str, sizes: Scale, measure: Measure, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    skip_unless_at(sizes, task, cached)
    problem = sizes.problem.with_(cached=cached, bank=1)
    stage = f"synthesis step for {task}, {cached} negatives"
    authors = opened(problem, stage, measure, tmp_path, request)
    authors.check_synthesis(task, gates.tolerance(precision))
    measure(
        lambda: authors.synthesize(task), setup=lambda: authors.rewind(task),
        group="synthesis step", stage=stage, engine="upstream", precision=precision,
        digest=problem.digest(), per=problem.config.synthesis.steps, rounds=sizes.rounds, warm=0,
        memory=sizes.name != "paper",
    )  # fmt: skip


def test_prompt_step(
    precision: str, sizes: Scale, measure: Measure, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    problem = sizes.problem.with_(cached=0)
    authors = opened(problem, "prompt step", measure, tmp_path, request)
    authors.check_store(gates.tolerance(precision))
    authors.fill(problem)
    steps = problem.config.storing.steps
    measure(
        lambda: authors.store(steps), setup=authors.restart_loaders, group="prompt step",
        stage="prompt step", engine="upstream", precision=precision, digest=problem.digest(),
        per=steps, rounds=sizes.rounds, warm=0, memory=sizes.name != "paper",
    )  # fmt: skip
