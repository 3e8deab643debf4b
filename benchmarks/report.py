"""``python benchmarks/report.py``: recorded results as docs/performance.md, with plots.

Reads every ``results/*.jsonl`` (one a machine and day, only ever appended to), takes the latest
row of each kind by machine, and writes tables and pictures; ``--summary`` prints the README's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plots import plots
from records import Machine, machines
from to_accuracy import mean_curves, reached

from kiop_fast.bench import Compared, seconds_text

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


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
    lines += to_accuracy(machine)
    for title, path in plots(machine, rows, pictures):
        lines += [f"![{title}](images/performance/{path.name})", ""]
    return lines


def to_accuracy(machine: Machine) -> list[str]:
    """Time to the reference's final accuracy, where whole demos were recorded."""
    curves = mean_curves(machine.records)
    if "reference" not in curves:
        return []
    goal = curves["reference"][-1].accuracy
    lines = ["### time to accuracy", "",
             f"Whole demo, mean of {curves['reference'][-1].seeds} seeds: final accuracies, "
             "and seconds of training until the mean over the tasks is the reference's final one.",
             "", "| | " + " | ".join(goal) + " | seconds to it | seconds in all |",
             "|---" * (len(goal) + 3) + "|"]  # fmt: skip
    for engine, curve in curves.items():
        final = " | ".join(f"{100 * curve[-1].accuracy[task]:.1f} %" for task in goal)
        at = reached(curve, goal)
        lines.append(f"| {engine} | {final} | {'not reached' if at is None else f'{at:.0f}'} "
                     f"| {curve[-1].seconds:.0f} |")  # fmt: skip
    return [*lines, ""]


def summary(found: list[Machine]) -> str:
    """The README's few lines: steps, epoch, data path and demo, the machine named."""
    groups = ("synthesis step", "prompt step", "epoch", "data paths", "demo")
    lines = []
    for machine in found:
        rows = [r for r in machine.rows() if r.group in groups and r.engine.startswith("fast")]
        if not rows:
            continue
        lines += [
            f"{machine.name}, scale {machine.scale}:",
            "",
            "| | engine | time | times as fast as `reference` |",
            "|---|---|---|---|",
        ]
        for row in rows:
            assert row.seconds is not None
            ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
            time = seconds_text(row.seconds)
            lines.append(f"| {row.stage} | {row.engine} | {time} | {ratio} |")
        lines.append("")
    return "\n".join(lines)


HEADER = """# Performance

Written by `python benchmarks/report.py` from `benchmarks/results/`; do not edit.  Every time
stands beside a result that was checked against the reference first; rows of one stage share the
digest of their problem.  Medians with quartiles of a step, batch or call; **bold**: times as fast
as `reference`, which has the structure and the cost of the authors' code, beside the ratio of
counted FLOP where both were counted.  No synthesis step timed here is a call's last, which the fast
engine makes cheap on a CPU.  `upstream` is the authors' code itself, unmodified; `tuned` the
reference with its banks on the device (and TF32 on a GPU); `compile` the restructured step under
`torch.compile(mode="reduce-overhead")`.  Measure again with `kiop-fast bench --record`.
"""

# What is aimed at on one H200, and stays a target until somebody measures it.
GPU_TARGETS = {
    "synthesis step for B, 4096 negatives, bf16": "1.8 ms, 50× upstream, 12× tuned",
    "synthesis step for B, 4096 negatives, tf32": "3.0 ms",
    "synthesis step for B, 4096 negatives, fp32": "13.5 ms",
    "prompt step, bf16": "0.5 ms, 25× upstream",
    "epoch with evaluation": "0.9 s, 45× upstream",
    "restructured step and graph over compile (reduce-overhead)": "1.5×",
    "peak memory": "1.2 GB",
    "host synchronisations in a 200-step synthesis": "1",
    "time to the reference's accuracy, demo": "100× the reference",
    "the six operations against eager and torch.compile": "docstrings in kiop_fast/kernels",
}


def not_yet_measured(found: list[Machine]) -> list[str]:
    """The GPU's rows, as long as no machine with a GPU is among those recorded."""
    if any(machine.run.get("driver") for machine in found):
        return []
    rows = [f"| {what} | {target} | not yet measured |" for what, target in GPU_TARGETS.items()]
    lead = "No GPU has been measured yet; `bash benchmarks/gpu.sh` does it."
    return ["## One H200", "", lead, "", "| | target | |", "|---|---|---|", *rows, ""]


def write(found: list[Machine], out: Path) -> None:
    """The page, its pictures in ``images/performance/`` beside it."""
    pictures = out.parent / "images" / "performance"
    parts = [line for machine in found for line in section(machine, pictures)]
    out.write_text("\n".join([HEADER, *parts, *not_yet_measured(found)]))


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
