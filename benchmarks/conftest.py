"""``pytest --benchmark-only``: options and fixtures of the benchmarks; without it nothing runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
# The tests' own tolerances and helpers are used here.
sys.path[:0] = [str(path) for path in (HERE, TESTS, TESTS / "kernels") if str(path) not in sys.path]

import engines  # noqa: E402
import machine  # noqa: E402
from measure import Measure, Session  # noqa: E402
from sizes import Scale, scale  # noqa: E402

GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kiop_fast benchmarks")
    group.addoption("--scale", choices=("small", "paper"), default="paper" if GPU else "small",
                    help="sizes (small on a CPU, paper on a GPU)")  # fmt: skip
    group.addoption("--engines", default=",".join((*engines.ENGINES, "upstream")),
                    help="the engines to time, with commas")  # fmt: skip
    group.addoption("--upstream", type=Path, help="a checkout of the authors' public code")
    group.addoption("--rows", type=Path, help="append every row to this JSON-lines file")
    group.addoption("--record", action="store_true",
                    help="append every row to benchmarks/results/MACHINE-DATE.jsonl")  # fmt: skip
    group.addoption("--sweep", action="store_true", help="time and memory as sizes grow")
    group.addoption("--whole-demo", action="store_true",
                    help="both engines run the whole demo: time to accuracy")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    known = (*engines.ENGINES, "upstream")
    if strange := sorted(set(config.getoption("engines").split(",")) - {*known}):
        raise pytest.UsageError(f"--engines: no {', '.join(strange)}; there are {', '.join(known)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plain ``pytest`` runs no benchmark."""
    return None if config.getoption("benchmark_only", default=False) else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contestant" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("engines").split(",")
        device = torch.device("cuda" if GPU else "cpu")
        rows = [row for row in engines.contestants(device) if row[0] in wanted]
        ids = [f"{name}-{precision}" for name, precision in rows]
        metafunc.parametrize("contestant", rows, ids=ids)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Scale:
    return scale(request.config.getoption("scale"), gpu=GPU)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest, device: torch.device, sizes: Scale) -> Session:
    files = [path for path in [request.config.getoption("rows")] if path]
    if request.config.getoption("record"):
        name = machine.slug(machine.facts(device)["device"])
        day = datetime.now(timezone.utc).date()
        files.append(HERE / "results" / f"{name}-{day}.jsonl")
    return Session(device, sizes.name, files)


@pytest.fixture
def measure(benchmark: Any, session: Session) -> Measure:
    return Measure(benchmark, session)


@pytest.fixture(scope="session")
def once() -> Callable[..., Any]:
    """``once(make, *key)``: the value made for a key, kept for the session, to check by."""
    made: dict[tuple[Any, ...], Any] = {}

    def get(make: Callable[[], Any], *key: Any) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    return get


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No compiled code or memory of an earlier row is left."""
    yield
    torch.compiler.reset()
    if GPU:
        torch.cuda.empty_cache()
