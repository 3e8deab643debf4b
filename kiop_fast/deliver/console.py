"""Tables for the terminal: accuracy, seeds, predictions, what a prompt file holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kiop_fast.deliver.predict import Prediction
    from kiop_fast.prompt.artefact import Artefact


def percent(value: float | None) -> str:
    """``61.2 %``, or a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _table(*columns: str, title: str | None = None, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left",
                  title_style="bold", caption_style="dim")  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def profile_table(period: str, rows: Sequence[tuple[str, float, float, float]]) -> Table:
    """Where the time of a step goes; the last row is the whole step."""
    table = _table("stage", "ms", "share", "GFLOP/s", "GB/s", title=period)
    whole = max(rows[-1][1], 1e-9)
    for name, spent, flops, moved in rows:
        table.add_row(name, f"{spent:.2f}", percent(spent / whole), f"{flops:.0f}", f"{moved:.1f}")
    return table


def accuracy_table(evaluation: Mapping[str, Any]) -> Table:
    """What :func:`kiop_fast.deliver.evaluate.evaluate` found, a row a task."""
    policies = evaluation["policies"]
    others = [name for name in policies if name != evaluation["batchnorm"]]
    table = _table(
        "task", "accuracy", "ceiling", "floor", "gain", "oracle", *others,
        caption=f"Real test images, last epoch, BatchNorm policy {evaluation['batchnorm']}"
        + (f"; beside it {' and '.join(others)}" if others else "")
        + ". Ceiling: the source model itself. Floor: the untrained prompt with the "
        "better of two data-free mappings. Oracle: the best mapping that test labels make.",
    )  # fmt: skip
    for name, facts in evaluation["tasks"].items():
        accuracy, floor = facts["accuracy"], facts["floor"]
        gain = "–" if floor is None else f"{100 * (accuracy - floor):+.1f}"
        table.add_row(
            name, f"[bold]{percent(accuracy)}[/]", percent(facts["ceiling"]), percent(floor), gain,
            percent(facts["oracle"]), *(percent(policies[p].get(name)) for p in others),
        )  # fmt: skip
    return table


def plain_table(accuracy: Mapping[str, float]) -> Table:
    """Accuracy alone (mode ``vanilla``)."""
    table = _table("task", "accuracy", caption="real test images, last epoch")
    for name, value in accuracy.items():
        table.add_row(name, f"[bold]{percent(value)}[/]")
    return table


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread)


def seeds_table(accuracies: Mapping[int, Mapping[str, float]]) -> Table:
    """Accuracy of every task by seed, and its mean ± standard deviation."""
    table = _table("task", *(f"seed {seed}" for seed in accuracies), "mean ± std",
                   caption="real test images, last epoch")  # fmt: skip
    for name in next(iter(accuracies.values()), {}):
        values = [found[name] for found in accuracies.values()]
        mean, std = mean_and_std(values)
        both = f"[bold]{100 * mean:.1f} ± {100 * std:.1f} %[/]"
        table.add_row(name, *map(percent, values), both)
    return table


def predictions_table(predictions: Iterable[Prediction]) -> Table:
    """A row a file and task: its classes, the most probable first."""
    table = _table("file", "task", "class", "probability", "then")
    for said in predictions:
        (name, chance), *rest = said.best
        then = ", ".join(f"{other} {percent(p)}" for other, p in rest)
        table.add_row(
            escape(said.file.name), said.task, f"[bold]{escape(name)}[/]", percent(chance),
            escape(then),
        )  # fmt: skip
    return table


def info_table(artefact: Artefact) -> Table:
    """What is inside a prompt file."""
    target = artefact.target
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rings = " → ".join(str(side) for side in (artefact.side, *artefact.rings))
    rows = {
        "format": f"version {artefact.version}",
        "target": f"{target.name}  ({target.arch}, {target.classes} classes)",
        "sha256": target.sha256,
        "rings": f"{rings} pixels",
        "cells": f"{artefact.cells_bytes:,} bytes, fp16",
        "statistics": f"{artefact.statistics_bytes:,} bytes, fp32",
        "BatchNorm": artefact.batchnorm,
    }
    for task in artefact.tasks:
        kind = "grey" if task.info.channels == 1 else "colour"
        rows[f"task {task.name}"] = (
            f"{len(task.info.classes)} classes, {kind}, {task.depth} ring"
            f"{'s' * (task.depth > 1)}: {_classes(artefact, task.name)}"
        )
    for name, value in artefact.metrics.get("accuracy", {}).items():
        rows[f"accuracy {name}"] = percent(value)
    rows["made with"] = ", ".join(f"{k} {v}" for k, v in artefact.versions.items())
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table


def _classes(artefact: Artefact, name: str, most: int = 12) -> str:
    """Class names; with the target's class that speaks for each, where there is a mapping."""
    task, names = artefact.task(name), artefact.target.info.classes
    if task.mapping is None:
        words = list(task.info.classes)
    else:
        pairs = zip(task.info.classes, task.mapping.tolist(), strict=True)
        words = [f"{theirs}←{names[ours]}" for theirs, ours in pairs]
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


def checks_table(checks: Sequence[Mapping[str, str]]) -> Table:
    """The doctor's findings, a row each, with what to do below a finding."""
    table = Table(title_justify="left", show_lines=False)
    for column in ("looked at", "", "found"):
        table.add_column(column, justify="left", overflow="fold")
    colours = {"pass": "green", "note": "yellow", "FAIL": "bold red"}
    for check in checks:
        fix = f"\n[bold]do:[/] {escape(check['fix'])}" if check["fix"] else ""
        state = f"[{colours[check['state']]}]{check['state']}[/]"
        table.add_row(check["name"], state, escape(check["found"]) + fix)
    return table
