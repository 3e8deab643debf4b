"""Time to accuracy: what whole demos of several seeds reached, and when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from kiop_fast.bench import Record


@dataclass(frozen=True)
class Point:
    """One evaluation, mean over the seeds.

    Attributes:
        seconds: of training until then.
        accuracy: by task.
    """

    seconds: float
    accuracy: dict[str, float]
    seeds: int


def mean_curves(records: Iterable[Record]) -> dict[str, list[Point]]:
    """By engine, the mean over the seeds of its whole demos; a seed's latest run counts."""
    runs: dict[str, dict[int, list[Record]]] = {}
    for record in records:
        if record["kind"] == "accuracy" and record.get("length") == "whole":
            runs.setdefault(record["engine"], {})[record["seed"]] = record["curve"]
    return {engine: _mean(list(by_seed.values())) for engine, by_seed in runs.items()}


def _mean(curves: list[list[Record]]) -> list[Point]:
    return [
        Point(
            fmean(point["seconds"] for point in points),
            {task: fmean(p["accuracy"][task] for p in points) for task in points[0]["accuracy"]},
            len(points),
        )
        for points in zip(*curves, strict=True)
    ]


def reached(curve: list[Point], goal: dict[str, float]) -> float | None:
    """Seconds until the mean over the tasks is that of ``goal``; None: it never is."""
    wanted = fmean(goal.values())
    return next((p.seconds for p in curve if fmean(p.accuracy.values()) >= wanted), None)
