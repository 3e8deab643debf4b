"""The pictures of docs/performance.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from records import Machine
from to_accuracy import mean_curves

from kiop_fast.bench import Compared

SHOWN = ("upstream", "reference", "tuned", "compile", "fast")
SPED_UP = ("synthesis step", "prompt step", "epoch", "data paths", "serving", "demo")
COLOURS = dict(zip(SHOWN, ("#8c8c8c", "#4c72b0", "#55a868", "#dd8452", "#c44e52"), strict=True))


def plots(machine: Machine, rows: list[Compared], folder: Path) -> list[tuple[str, Path]]:
    """The pictures that the machine's rows allow."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, title, draw in (
        ("speedup", "Speed-up over the reference by stage", _speedups),
        ("roofline", "Roofline of the operations", _roofline),
        ("scaling", "Time and memory against size", _scaling),
        ("accuracy", "Time to accuracy", _accuracy),
    ):
        figure = pyplot.figure(figsize=(8, 4.5), layout="constrained")
        if draw(figure, machine, rows):
            figure.suptitle(f"{title} ({machine.name}, {machine.scale})", fontsize=10)
            path = folder / f"{_slug(machine)}-{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": ""})
            made.append((title, path))
        pyplot.close(figure)
    return made


def _speedups(figure: Any, machine: Machine, rows: list[Compared]) -> bool:
    chosen = [row for row in rows if row.ratio and row.group in SPED_UP]
    if not chosen:
        return False
    stages = list(dict.fromkeys(row.stage for row in chosen))
    engines = [e for e in dict.fromkeys(row.engine for row in chosen) if e != "reference"]
    axes = figure.subplots()
    height = 0.8 / max(len(engines), 1)
    for k, engine in enumerate(engines):
        mine = {row.stage: row.ratio for row in chosen if row.engine == engine}
        where = [stages.index(stage) + (k - len(engines) / 2 + 0.5) * height for stage in mine]
        axes.barh(where, list(mine.values()), height, label=engine,
                  color=COLOURS.get(engine.split(" ")[0]),
                  alpha=0.5 if engine.endswith("bf16") else 1)  # fmt: skip
    axes.set_yticks(range(len(stages)), stages, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    if axes.get_xlim()[1] > 20:  # a GPU's ratios; bars that start at 0 are honest below that
        axes.set_xscale("log")
    axes.set_xlabel("times as fast as the reference")
    axes.legend(fontsize=7)
    return True


def _roofline(figure: Any, machine: Machine, rows: list[Compared]) -> bool:
    points = [r for r in machine.latest() if r["group"] == "kernels" and r.get("bytes")]
    if not points:
        return False
    axes, ceilings = figure.subplots(), machine.run["ceilings"]
    stages = list(dict.fromkeys(r["stage"] for r in points))
    for engine in dict.fromkeys(r["engine"] for r in points):
        mine = [r for r in points if r["engine"] == engine]
        axes.scatter([stages.index(r["stage"]) for r in mine],
                     [r["bytes_per_s"] / 1e9 for r in mine], s=18, label=engine)  # fmt: skip
    axes.axhline(ceilings["bytes_per_s"] / 1e9, color="black", lw=0.8, label="large copy")
    axes.set_xticks(range(len(stages)), stages, fontsize=6, rotation=60, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("GB/s of what has to be moved")
    axes.legend(fontsize=7)
    return True


def _scaling(figure: Any, machine: Machine, rows: list[Compared]) -> bool:
    points = [r for r in machine.latest() if r["group"] == "scaling"]
    names = list(dict.fromkeys(r["axis"] for r in points))
    if not names:
        return False
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for engine in dict.fromkeys(r["engine"] for r in points):
            mine = sorted((r for r in points if (r["axis"], r["engine"]) == (name, engine)),
                          key=lambda r: r["point"])  # fmt: skip
            size = [r["point"] for r in mine]
            grid[0, column].plot(size, [r["median"] * 1e3 for r in mine], "o-", ms=3, label=engine)
            memory = [(r["peak_memory"] or 0) / 2**20 for r in mine]
            grid[1, column].plot(size, memory, "o-", ms=3)
        grid[0, column].set_yscale("log")
        grid[1, column].set_xlabel(name)
        grid[1, column].set_ylim(bottom=0)
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("peak memory, MiB")
    grid[0, 0].legend(fontsize=7)
    return True


def _accuracy(figure: Any, machine: Machine, rows: list[Compared]) -> bool:
    curves = mean_curves(machine.records)
    if not curves:
        return False
    axes = figure.subplots()
    for engine, curve in curves.items():
        for task in curve[-1].accuracy:
            axes.plot([p.seconds for p in curve], [100 * p.accuracy[task] for p in curve], "o-",
                      ms=3, label=f"{engine}, {task}")  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("accuracy on real test images, %")
    axes.legend(fontsize=7)
    return True


def _slug(machine: Machine) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{machine.name} {machine.scale}".lower()).strip("-")
