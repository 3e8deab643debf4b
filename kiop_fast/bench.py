"""Runs the benchmarks of a checkout and compares what they wrote down.

A record is one line of JSON: ``run`` (the machine, its versions and its ceilings), ``row`` (one
engine at one stage), ``accuracy`` (of a row), ``unavailable`` (a row that cannot be had there).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from kiop_fast.deliver.console import percent
from kiop_fast.errors import RunError

BASELINE = "reference"

Record = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One engine at one stage, beside the reference.

    Attributes:
        group, stage: what was done; times compare within a stage.
        engine: who did it, with its precision where one engine has several.
        seconds: median of a step, batch or call, with its quartiles.
        ratio: the reference's median over this one; None where there is no reference.
        bound: the reference's floating-point operations over this one's, where both were counted:
            what the ratio would be if nothing but products took time.
        digest: of the problem, the same for a whole stage.
        accuracy: by task, where it applies.
        unavailable: why there is no time; empty where there is one.
    """

    group: str
    stage: str
    engine: str
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    bound: float | None = None
    digest: str = ""
    accuracy: dict[str, float] | None = None
    unavailable: str = ""

    def facts(self) -> Record:
        """JSON-able."""
        return {k: v for k, v in vars(self).items() if v not in (None, "")}


def benchmarks_folder() -> Path:
    """``benchmarks/`` of the checkout this package is imported from.

    Raises:
        RunError: the package was installed without its repository.
    """
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "conftest.py").exists():
        raise RunError(
            "the benchmarks are part of the repository, not of the installed package",
            got=str(folder), expected="a folder of benchmarks beside the package",
            fix="clone the repository and install it with pip install -e '.[dev]'",
        )  # fmt: skip
    return folder


def run_benchmarks(
    options: Sequence[str] = (), *, record: bool = False, quiet: bool = False
) -> list[Record]:
    """``pytest benchmarks --benchmark-only`` in a process of its own; its records.

    Args:
        options: for pytest, e.g. ``["--scale", "paper", "-k", "prompt_step"]``.
        record: also append the records to ``benchmarks/results/``.
        quiet: do not show pytest's output.

    Raises:
        RunError: pytest or pytest-benchmark is missing, or an engine's result was wrong: then
            there is no time for it.
    """
    folder = benchmarks_folder()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", "-q",
                   "--benchmark-columns=median,iqr,rounds", "--rows", str(rows), *options,
                   *(["--record"] if record else [])]  # fmt: skip
        done = subprocess.run(
            command, cwd=folder.parent, stdout=subprocess.DEVNULL if quiet else None, check=False
        )
        records = read_records(rows) if rows.exists() else []
    if done.returncode or not records:
        raise RunError(
            "the benchmarks did not come to a good end",
            got=f"pytest's exit code {done.returncode}, {len(records)} records",
            expected="every result checked against the reference, pytest-benchmark installed",
            fix="pip install -e '.[dev]'; then read the failures of: " + " ".join(command[1:6]),
        )
    return records


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file; a last line that was cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def compared(records: Iterable[Record]) -> list[Compared]:
    """Rows by stage, in the order they were measured; the latest of each kind counts."""
    latest: dict[tuple[str, str, str], Record] = {}
    accuracies: dict[tuple[str, str], dict[str, float]] = {}
    missing: dict[tuple[str, str], str] = {}
    for record in records:
        where = (record.get("stage", ""), record.get("engine", ""))
        if record["kind"] == "row":
            latest[where[0], where[1], record["precision"]] = record
            missing.pop(where, None)
        elif record["kind"] == "accuracy":
            accuracies[where] = record["accuracy"]
        elif record["kind"] == "unavailable":
            missing[where] = record["reason"]
    stages: dict[str, list[Compared]] = {}
    for (stage, engine, precision), row in latest.items():
        base = _baseline(latest, stage)
        several = len({key[2] for key in latest if key[1] == engine}) > 1
        comparable = base is not None and base["digest"] == row["digest"]
        stages.setdefault(stage, []).append(Compared(
            row["group"], stage, f"{engine} {precision}" if several else engine, row["median"],
            (row["q1"], row["q3"]),
            base["median"] / row["median"] if comparable and base else None,
            row["reference_flop"] / row["flop"]
            if row.get("reference_flop") and row.get("flop")
            else None,
            row["digest"], accuracies.get((stage, engine)),
        ))  # fmt: skip
    for (stage, engine), reason in missing.items():
        if not any(key[:2] == (stage, engine) for key in latest):
            stages.setdefault(stage, []).append(Compared("", stage, engine, unavailable=reason))
    return [row for rows in stages.values() for row in rows]


def _baseline(latest: dict[tuple[str, str, str], Record], stage: str) -> Record | None:
    rows = [row for key, row in latest.items() if key[:2] == (stage, BASELINE)]
    return rows[0] if rows else None


def seconds_text(seconds: float) -> str:
    """``1.23 s``, ``4.56 ms`` or ``7.89 µs``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def bench_table(rows: Iterable[Compared]) -> Table:
    """Engine by stage: time, ratio to the reference, accuracy where it applies."""
    table = Table(caption="Of a step, batch or call; every result was checked first.")
    for column in ("stage", "engine", "median", "quartiles", "× reference", "accuracy"):
        table.add_column(column, justify="left" if column in ("stage", "engine") else "right")
    before = ""
    for row in rows:
        stage, before = ("" if row.stage == before else row.stage), row.stage
        if row.seconds is None:
            table.add_row(stage, row.engine, f"[dim]unavailable: {escape(row.unavailable)}[/]")
            continue
        spread = " … ".join(map(seconds_text, row.quartiles or ()))
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        ratio += "" if row.bound is None else f" (FLOP {row.bound:.2f})"
        found = ", ".join(f"{task} {percent(v)}" for task, v in (row.accuracy or {}).items())
        table.add_row(stage, row.engine, f"[bold]{seconds_text(row.seconds)}[/]", spread, ratio,
                      found)  # fmt: skip
    return table
