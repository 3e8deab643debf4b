"""Synthesis step, prompt step and epoch: every engine on the same draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import gates
import pytest
import torch
from measure import Measure
from sizes import Problem, Scale
from world import World, flop_of

from kiop_fast.prompt import prompted

CACHED = (0, 256, 4096)


def skip_at_small(engine: str, sizes: Scale, *, worth_compiling: bool) -> None:
    """A compilation takes half a minute on two cores: at scale small one of a kind is enough."""
    if sizes.name == "small" and engine == "compile" and not worth_compiling:
        pytest.skip("compiled at scale paper")


def skip_unless_at(sizes: Scale, task: str, cached: int) -> None:
    """The scale's sizes of the feature bank; at scale small A's own task has the largest alone."""
    wanted = sizes.cached if task == "B" or sizes.name == "paper" else sizes.cached[-1:]
    if cached not in wanted:
        pytest.skip(f"not at scale {sizes.name}")


def countable(engine: str, device: torch.device) -> bool:
    """Whether every operation of a call is dispatched once: not in graphs nor compiled code."""
    return engine in ("reference", "tuned") or (engine == "fast" and device.type == "cpu")


def extra_warmth(engine: str, device: torch.device) -> int:
    """Calls after the checked one until a time is steady: compiled code and graphs need one."""
    return int(engine == "compile" or device.type == "cuda")


@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("task", ["B", "A"])
def test_synthesis_step(
    task: str, cached: int, contestant: tuple[str, str], sizes: Scale, measure: Measure,
    once: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    skip_unless_at(sizes, task, cached)
    engine, precision = contestant
    skip_at_small(engine, sizes, worth_compiling=(task, cached) == ("B", 256))
    problem = sizes.problem.with_(cached=cached, bank=1)
    device = measure.session.device

    def world(name: str, precision: str) -> World:
        made = engines.make(name)
        return World(problem, made, device, tmp_path / name, (task,), precision)

    def by_reference() -> tuple[Any, float]:
        with engines.running_at("fp32"):
            made = world("reference", "fp32")
            results: list[Any] = []
            flop = flop_of(lambda: results.append(made.synthesizing(task)()))
            return results[0], flop

    expected, flop = once(by_reference, "synthesis", problem.digest(), task)
    with engines.running_at(precision, engine):
        made = world(engine, precision)
        gates.check_synthesis(made.synthesizing(task)(), expected, precision)
        made.rewind(task)
        call = made.stepping(task)
        counted = flop_of(call) if countable(engine, device) else 0.0
        measure(
            call, setup=lambda: made.rewind(task), group="synthesis step",
            stage=f"synthesis step for {task}, {cached} negatives", engine=engine,
            precision=precision, digest=problem.digest(), per=problem.config.synthesis.steps,
            rounds=sizes.rounds, warm=extra_warmth(engine, device),
            memory=sees_memory(sizes, device), flop=counted or None, reference_flop=flop,
        )  # fmt: skip


def sees_memory(sizes: Scale, device: torch.device) -> bool:
    """One more call of the paper's size is worth it on a GPU alone."""
    return sizes.name != "paper" or device.type == "cuda"


def test_prompt_step(
    contestant: tuple[str, str], sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompt_step(sizes.problem.with_(cached=0), "prompt step", contestant, sizes, measure, once,
                tmp_path)  # fmt: skip


def prompt_step(
    problem: Problem, stage: str, contestant: tuple[str, str], sizes: Scale, measure: Measure,
    once: Callable[..., Any], folder: Path, group: str = "prompt step", **more: Any,
) -> None:  # fmt: skip
    """Time a storing period whose first steps are the reference's."""
    engine, precision = contestant
    device = measure.session.device

    def by_reference() -> tuple[Any, float]:
        with engines.running_at("fp32"):
            made = World(problem, engines.make("reference"), device, folder / "expected")
            results: list[Any] = []
            flop = flop_of(lambda: results.append(made.store()))
            return results[0], flop

    expected, flop = once(by_reference, "storing", problem.digest())
    with engines.running_at(precision, engine):
        made = World(problem, engines.make(engine), device, folder / engine, precision=precision)
        logs: list[Any] = []
        counted = flop_of(lambda: logs.append(made.store())) if countable(engine, device) else 0.0
        log = logs[0] if logs else made.store()
        gates.check_storing(log, expected, precision, problem.config.storing.temperature)
        measure(
            made.store, group=group, stage=stage, engine=engine, precision=precision,
            digest=problem.digest(), per=problem.config.storing.steps, rounds=sizes.rounds,
            warm=extra_warmth(engine, device), memory=sees_memory(sizes, device),
            flop=counted or None, reference_flop=flop, **more,
        )  # fmt: skip


def test_prompt_step_windowed(
    contestant: tuple[str, str], sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The fast engine with windows: what they are worth on this GPU and precision."""
    if contestant[0] != "fast" or measure.session.device.type != "cuda":
        pytest.skip("windows are the fast engine's; on a CPU they are measured: docs/engine.md")
    monkeypatch.setattr(prompted, "DEVICES", [*prompted.DEVICES, "cuda"])
    prompt_step(sizes.problem.with_(cached=0), "prompt step, windowed", contestant, sizes, measure,
                once, tmp_path)  # fmt: skip


def test_epoch(
    contestant: tuple[str, str], sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    epoch("epoch with evaluation", contestant, sizes, measure, once, tmp_path)


def test_epoch_offloaded(
    contestant: tuple[str, str], sizes: Scale, measure: Measure, once: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """What the setting ``offload`` costs in time and saves in memory."""
    if contestant != ("fast", "bf16") or measure.session.device.type != "cuda":
        pytest.skip("the fast engine offloads, from a GPU; one precision says what it costs")
    epoch("epoch, offloaded", contestant, sizes, measure, once, tmp_path, offload=True)


def epoch(
    stage: str, contestant: tuple[str, str], sizes: Scale, measure: Measure,
    once: Callable[..., Any], folder: Path, *, offload: bool = False,
) -> None:  # fmt: skip
    """Both syntheses, banks, storing and evaluation; successive epochs, as in a run."""
    engine, precision = contestant
    skip_at_small(engine, sizes, worth_compiling=False)
    device = measure.session.device
    # Checked with two steps a call, after which rounding parts; timed with several, for the last
    # is cheap on a CPU (`World.stepping`).
    steps = max(8, sizes.problem.config.synthesis.steps)
    problem = sizes.problem.with_(bank=min(512, sizes.problem.bank), synthesis={"steps": steps})
    short = problem.with_(synthesis={"steps": gates.STEPS})

    def world(problem: Problem, name: str, precision: str) -> World:
        made = engines.make(name)
        mine = offload and name == "fast"
        return World(problem, made, device, folder / name, precision=precision, offload=mine)

    def by_reference() -> Any:
        with engines.running_at("fp32"):
            return world(short, "reference", "fp32").epoch(0)

    expected = once(by_reference, "epoch", short.digest())
    with engines.running_at(precision, engine):
        found = world(short, engine, precision).epoch(0)
        gates.check_epoch(found, expected, precision, problem.config.storing.temperature)
        made = world(problem, engine, precision)
        made.epoch(0)
        numbers = iter(range(1, 100))
        measure(
            lambda: made.epoch(next(numbers)), group="epoch", stage=stage,
            engine=engine, precision=precision, digest=problem.digest(), rounds=2,
            warm=extra_warmth(engine, device), memory=sees_memory(sizes, device),
            steps={"synthesis": 2 * problem.config.synthesis.steps,
                   "storing": problem.config.storing.steps},
        )  # fmt: skip
