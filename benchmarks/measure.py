"""One timed row: warm, measured, described, written down at once."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import pytest
import torch

from kiop_fast.errors import GraphError
from kiop_fast.runtime.static_step import StaticStep

Call = Callable[[], Any]

REPEATS = 20  # calls in one timed graph


@dataclass
class Session:
    """What all rows of a run share.

    Attributes:
        device: where it runs.
        scale: small | paper.
        files: JSON-lines files that every finished row is appended to, so that a run which is cut
            short keeps what it has.
        digests: of the problem of every stage seen so far: compared rows must share it.
    """

    device: torch.device
    scale: str
    files: list[Path]
    digests: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Once, before the first row: look at the machine and measure its ceilings."""
        if self.facts:
            return
        self.facts = machine.facts(self.device)
        self.ceilings = machine.ceilings(self.device)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.write({"kind": "run", "began": now, "scale": self.scale, **self.facts,
                    "ceilings": self.ceilings})  # fmt: skip

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to every file."""
        for path in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")


class Measure:
    """The fixture of a benchmark: ``measure(call, stage=…, engine=…, digest=…)``."""

    def __init__(self, benchmark: Any, session: Session) -> None:
        self.benchmark, self.session = benchmark, session

    def unavailable(self, stage: str, engine: str, reason: str) -> None:
        """A row that cannot be had here is named as such, never guessed."""
        self.session.begin()
        self.session.write(
            {"kind": "unavailable", "stage": stage, "engine": engine, "reason": reason}
        )
        pytest.skip(f"{stage}, {engine}: unavailable: {reason}")

    def __call__(
        self, call: Call, *, group: str, stage: str, engine: str, precision: str, digest: str,
        setup: Call | None = None, per: int = 1, rounds: int | None = None, seconds: float = 0.3,
        warm: int = 1, bytes_moved: float | None = None, flop: float | None = None,
        memory: bool = True, capture: bool = False, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Time ``call``; its result has been checked by the caller.

        Args:
            group: kernels, synthesis, …
            stage: what is compared; a row of the table.
            engine, precision: who.
            digest: of the problem; equal within a stage.
            setup: before every timed call, not timed.
            per: steps, batches … in one call; times are divided by it.
            rounds: timed calls; by default as many as fit in ``seconds``, 5 to 200.
            warm: untimed calls before.
            bytes_moved, flop: of one call.
            memory: make one more call to see its peak memory.
            capture: on a GPU, time replays of a CUDA graph of ``REPEATS`` calls, where that
                works: one small kernel would take less than launching its graph.
            more: facts for the row.
        """
        session, device = self.session, self.session.device
        session.begin()
        known = session.digests.setdefault(stage, digest)
        assert known == digest, f"{stage}: rows of different problems, {known} and {digest}"
        peak = machine.peak_memory(_after(setup, call), device) if memory else None
        for _ in range(warm):
            _after(setup, call)()
        replay = graph_of(call, device) if capture and device.type == "cuda" else None
        calls = per * (REPEATS if replay else 1)
        timed = Timed(replay or call, device)
        if rounds is None:
            if setup:
                setup()
            timed()
            rounds = max(5, min(200, int(seconds / max(timed.last, 1e-9))))
            timed.device_seconds.clear()
        self.benchmark.group = stage
        hook = (lambda: (setup(), ((), {}))[1]) if setup else None
        self.benchmark.pedantic(timed, setup=hook, rounds=rounds, iterations=1)
        walls = self.benchmark.stats.stats.data
        row = {
            "kind": "row", "group": group, "stage": stage, "engine": engine,
            "precision": precision, "scale": session.scale, "digest": digest, "per": per,
            "rounds": rounds, "clock": "CUDA events" if timed.device_seconds else "wall",
            **_quartiles([t / calls for t in timed.device_seconds or walls]),
            "wall_median": statistics.median(walls) / calls,
            "peak_memory": peak, "graph": replay is not None, **more,
        }  # fmt: skip
        row |= self._rates(row["median"] * per, bytes_moved, flop, precision)
        self.benchmark.extra_info.update(row | session.facts | {"ceilings": session.ceilings})
        session.write(row)
        return row

    def _rates(
        self, seconds: float, bytes_moved: float | None, flop: float | None, precision: str
    ) -> dict[str, Any]:
        """Achieved bytes/s and FLOP/s, and their share of this run's ceilings."""
        found: dict[str, Any] = {}
        ceilings = self.session.ceilings
        if bytes_moved:
            found |= {"bytes": bytes_moved, "bytes_per_s": bytes_moved / seconds}
            found["share_of_copy"] = found["bytes_per_s"] / ceilings["bytes_per_s"]
        if flop:
            found |= {"flop": flop, "flop_per_s": flop / seconds}
            key = "tf32" if precision == "default" else precision
            best = ceilings.get(f"{key}_flop_per_s")
            found["share_of_product"] = found["flop_per_s"] / best if best else None
        return found


class Timed:
    """A call that ends when the device is done; on a GPU, timed by events too."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.device = call, device
        self.device_seconds: list[float] = []
        self.last = 0.0

    def __call__(self) -> None:
        if self.device.type != "cuda":
            import time

            began = time.perf_counter()
            self.call()
            self.last = time.perf_counter() - began
            return
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self.call()
        second.record()
        torch.cuda.synchronize()
        self.last = first.elapsed_time(second) / 1000
        self.device_seconds.append(self.last)


def graph_of(call: Call, device: torch.device) -> Call | None:
    """Replays of a CUDA graph of the call, ``REPEATS`` times; None where it cannot be captured."""

    def body() -> None:
        for _ in range(REPEATS):
            call()

    replay = StaticStep(body, list, device)
    try:
        replay()
    except GraphError:
        return None
    return replay


def _after(setup: Call | None, call: Call) -> Call:
    def both() -> None:
        if setup:
            setup()
        call()

    return both


def _quartiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "min": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(values)}
