"""``python benchmarks/report.py``: recorded results as docs/performance.md, with plots.

Reads every ``results/*.jsonl`` (one a machine and day, only ever appended to), takes the latest
row of each kind by machine, and writes tables and pictures; ``--summary`` prints the README's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kiop_fast.bench import Compared, Record, compared, read_records, seconds_text

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SHOWN = ("upstream", "reference", "tuned", "compile", "fast")
SPED_UP = ("synthesis step", "prompt step", "epoch", "data paths", "serving", "demo")
COLOURS = dict(zip(SHOWN, ("#8c8c8c", "#4c72b0", "#55a868", "#dd8452", "#c44e52"), strict=True))


@dataclass
class Machine:
    """Everything recorded at one scale on one machine.

    Attributes:
        run: facts of the latest run: device, versions, ceilings.
    """

    name: str
    scale: str
    run: Record
    records: list[Record] = field(default_factory=list)

    def rows(self) -> list[Compared]:
        """Compared rows, stages in the order they were measured."""
        return compared(self.records)

    def latest(self) -> list[Record]:
        """The raw latest row of each stage, engine and precision."""
        found = {
            (r["stage"], r["engine"], r["precision"]): r for r in self.records if r["kind"] == "row"
        }
        return list(found.values())


def machines(files: Iterable[Path]) -> list[Machine]:
    """Records by machine and scale, oldest first."""
    found: dict[tuple[str, str], Machine] = {}
    for file in sorted(files, key=lambda path: path.stem[-10:]):
        here: Machine | None = None
        for record in read_records(file):
            if record["kind"] == "run":
                key = record["device"], record["scale"]
                here = found.setdefault(key, Machine(*key, record))
                here.run = record
            elif here is not None:
                here.records.append(record)
    return list(found.values())


def table(rows: list[Compared], group: str) -> list[str]:
    """Markdown: a stage a row, an engine a column, times with the ratio to the reference."""
    mine = [row for row in rows if row.group == group]
    engines = list(dict.fromkeys(row.engine for row in mine))
    stages = list(dict.fromkeys(row.stage for row in mine))
    cells = {(row.stage, row.engine): row for row in mine}
    lines = ["| | " + " | ".join(engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for stage in stages:
        texts = [_cell(cells.get((stage, engine))) for engine in engines]
        lines.append(f"| {stage} | " + " | ".join(texts) + " |")
    return lines


def _cell(row: Compared | None) -> str:
    if row is None or row.seconds is None:
        return "–"
    low, high = row.quartiles or (row.seconds, row.seconds)
    ratio = "" if row.ratio is None or row.engine == "reference" else f" **{row.ratio:.2f}×**"
    if row.bound is not None and row.engine != "reference":
        ratio += f" (FLOP {row.bound:.2f}×)"
    text = f"{seconds_text(row.seconds)} ({seconds_text(low)} … {seconds_text(high)}){ratio}"
    if row.accuracy:
        text += "; " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in row.accuracy.items())
    return text


def section(machine: Machine, pictures: Path) -> list[str]:
    """One machine: its facts, a table a group, what was unavailable, its plots."""
    run, rows = machine.run, machine.rows()
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
    ceilings = run["ceilings"]
    products = ", ".join(
        f"{key.split('_')[0]} product {value / 1e9:,.0f} GFLOP/s"
        for key, value in ceilings.items()
        if key.endswith("flop_per_s")
    )
    lines = [
        f"## {machine.name}, scale {machine.scale}", "",
        f"{run['threads']} threads on {run['cores']} cores; {versions}; Python {run['python']}"
        + (f"; driver {run['driver']}" if run.get("driver") else "")
        + f"; last run {run['began']}, commit {run['commit']}.",
        f"Ceilings of that run: copy {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s, {products}.",
        "",
    ]  # fmt: skip
    for group in dict.fromkeys(row.group for row in rows if row.group):
        lines += [f"### {group}", "", *table(rows, group), ""]
    missing = [row for row in rows if row.seconds is None]
    if missing:
        lines += ["Not available there:", ""]
        lines += [f"- {row.stage}, {row.engine}: {row.unavailable}" for row in missing] + [""]
    for title, path in plots(machine, rows, pictures):
        lines += [f"![{title}](images/performance/{path.name})", ""]
    return lines


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
                  color=COLOURS.get(engine.split(" ")[0]))  # fmt: skip
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
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("peak memory, MiB")
    grid[0, 0].legend(fontsize=7)
    return True


def _accuracy(figure: Any, machine: Machine, rows: list[Compared]) -> bool:
    curves = [r for r in machine.records if r["kind"] == "accuracy" and r["stage"] == "whole demo"]
    if not curves:
        return False
    axes = figure.subplots()
    for record in {r["engine"]: r for r in curves}.values():
        for task in record["accuracy"]:
            axes.plot([p["seconds"] for p in record["curve"]],
                      [100 * p["accuracy"][task] for p in record["curve"]], "o-", ms=3,
                      label=f"{record['engine']}, {task}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("accuracy on real test images, %")
    axes.legend(fontsize=7)
    return True


def _slug(machine: Machine) -> str:
    import re

    return re.sub(r"[^a-z0-9]+", "-", f"{machine.name} {machine.scale}".lower()).strip("-")


def summary(found: list[Machine]) -> str:
    """The README's few lines: steps, epoch, data path and demo, the machine named."""
    groups = ("synthesis step", "prompt step", "epoch", "data paths", "demo")
    lines = []
    for machine in found:
        rows = [r for r in machine.rows() if r.group in groups and r.engine.startswith("fast")]
        if not rows:
            continue
        lines += [f"{machine.name}, scale {machine.scale}:", "",
                  "| | fast | times as fast as `reference` |", "|---|---|---|"]  # fmt: skip
        for row in rows:
            assert row.seconds is not None
            ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
            lines.append(f"| {row.stage} | {seconds_text(row.seconds)} | {ratio} |")
        lines.append("")
    return "\n".join(lines)


HEADER = """# Performance

Written by `python benchmarks/report.py` from `benchmarks/results/`; do not edit.  Every time
stands beside a result that was checked against the reference first; rows of one stage share the
digest of their problem.  Medians with quartiles of a step, batch or call; **bold**: times as fast
as `reference`, which has the structure and the cost of the authors' code, beside the ratio of
counted FLOP where both were counted.  `upstream` is that code
itself, unmodified; `tuned` the reference with its banks on the device (and TF32 on a GPU);
`compile` the restructured step under `torch.compile(mode="reduce-overhead")`.  Measure again with
`kiop-fast bench --record`.  A GPU that is not named below has not been measured yet.
"""


def write(found: list[Machine], out: Path) -> None:
    """The page, its pictures in ``images/performance/`` beside it."""
    pictures = out.parent / "images" / "performance"
    parts = [line for machine in found for line in section(machine, pictures)]
    out.write_text("\n".join([HEADER, *parts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: results/*.jsonl")
    parser.add_argument("--summary", action="store_true", help="print the README's table")
    parser.add_argument("--out", type=Path, default=DOCS / "performance.md")
    asked = parser.parse_args()
    found = machines(asked.files or (HERE / "results").glob("*.jsonl"))
    if asked.summary:
        print(summary(found))
        return
    write(found, asked.out)
    print(asked.out)


if __name__ == "__main__":
    main()
