"""Records of benchmarks: compared by stage, cut short, gated by ratios; plain pytest runs none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kiop_fast.bench import bench_table, benchmarks_folder, compared, read_records, seconds_text

ROOT = Path(__file__).parent.parent
REGRESSION = ROOT / "benchmarks" / "regression.py"


def row(engine: str, median: float, **more: Any) -> dict[str, Any]:
    values = {"kind": "row", "group": "prompt step", "stage": "prompt step", "engine": engine,
              "precision": "fp32", "scale": "small", "digest": "d1", "median": median,
              "q1": median, "q3": median, "min": median}  # fmt: skip
    return values | more


def test_ratios_are_against_the_reference_of_the_same_problem() -> None:
    records = [
        row("reference", 0.5), row("fast", 0.3), row("fast", 0.25),
        row("fast", 0.1, precision="bf16"), row("tuned", 0.4, digest="another problem"),
        {"kind": "unavailable", "stage": "prompt step", "engine": "upstream", "reason": "no path"},
        {"kind": "unavailable", "stage": "prompt step", "engine": "fast", "reason": "then it was"},
        {"kind": "accuracy", "stage": "prompt step", "engine": "reference",
         "accuracy": {"digits": 0.5}},
    ]  # fmt: skip
    found = {r.engine: r for r in compared(records)}
    assert found["fast fp32"].ratio == pytest.approx(2.0)  # the later of the two
    assert found["fast bf16"].ratio == pytest.approx(5.0)
    assert found["reference"].ratio == 1.0
    assert found["reference"].accuracy == {"digits": 0.5}
    assert found["tuned"].ratio is None
    assert found["upstream"].unavailable == "no path"
    assert "fast" not in found
    console = Console(width=200)
    with console.capture() as capture:
        console.print(bench_table(found.values()))
    text = capture.get()
    assert "250 ms" in text
    assert "unavailable: no path" in text
    assert "digits 50.0 %" in text


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("fast", 1.0)) + "\n" + json.dumps(row("fast", 2.0))[:30])
    assert [r["median"] for r in read_records(path)] == [1.0]


def test_seconds() -> None:
    assert [seconds_text(s) for s in (2.5, 0.012, 3e-6)] == ["2.5 s", "12 ms", "3 µs"]


def gate(rows: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REGRESSION), str(rows), *options],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(("now", "code"), [(2.0, 0), (1.5, 0), (1.3, 1)])
def test_gate_looks_at_ratios_alone(now: float, code: int, tmp_path: Path) -> None:
    """A machine of half the speed passes; a lost third of the ratio does not."""
    baseline, rows = tmp_path / "baseline.json", tmp_path / "rows.jsonl"
    baseline.write_text(json.dumps({"small: prompt step (fp32)": 2.0}))
    rows.write_text(
        "\n".join(json.dumps(r) for r in (row("reference", 8.0), row("fast", 8.0 / now)))
    )
    done = gate(rows, "--baseline", str(baseline))
    assert done.returncode == code, done.stdout + done.stderr
    assert f"{now:.2f}× the reference, recorded 2.00×" in done.stdout


def test_gate_needs_something_to_compare(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row("fast", 1.0)) + "\n")
    done = gate(rows, "--baseline", str(tmp_path / "none.json"))
    assert done.returncode != 0
    assert "no stage" in done.stderr


def test_benchmarks_run_only_when_asked_for() -> None:
    """Collected by ``--benchmark-only`` from the root, and by nothing else."""

    def collected(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout

    asked = collected("--benchmark-only")
    assert "benchmarks/test_bench_steps.py" in asked
    assert "tests/" not in asked
    assert "test_bench_steps" not in collected("benchmarks", "tests/test_bench.py")
    assert benchmarks_folder() == ROOT / "benchmarks"


def test_report_tells_the_time_to_the_references_accuracy(tmp_path: Path) -> None:
    """Means over two seeds: the reference ends at 60 %, which fast passes at its second look."""

    def whole(engine: str, seed: int, *curve: tuple[float, float]) -> dict[str, Any]:
        points = [{"seconds": t, "accuracy": {"letters": x, "digits": x - 0.2}} for t, x in curve]
        return {"kind": "accuracy", "stage": f"whole demo, seed {seed}", "engine": engine,
                "length": "whole", "seed": seed, "accuracy": points[-1]["accuracy"],
                "curve": points}  # fmt: skip

    run = {"kind": "run", "device": "Processor", "scale": "small", "threads": 1, "cores": 1,
           "versions": {"torch": "2"}, "python": "3", "began": "today", "commit": "abc",
           "ceilings": {"bytes_per_s": 1e9}}  # fmt: skip
    records = [
        run,
        whole("reference", 0, (50, 0.4), (100, 0.5)), whole("reference", 1, (70, 0.4), (120, 0.7)),
        whole("fast", 0, (10, 0.5), (20, 0.6)), whole("fast", 1, (14, 0.5), (24, 0.66)),
    ]  # fmt: skip
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text("\n".join(map(json.dumps, records)))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(rows), "--out", str(page)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| reference | 60.0 % | 40.0 % | 110 | 110 |" in page.read_text()
    assert "| fast | 63.0 % | 43.0 % | 22 | 22 |" in page.read_text()
    assert list(tmp_path.glob("images/performance/*accuracy.png"))
    assert "| prompt step, bf16 | 0.5 ms, 25× upstream | not yet measured |" in page.read_text()
    records[0] = run | {"driver": "580.1"}
    rows.write_text("\n".join(map(json.dumps, records)))
    subprocess.run([*done.args], check=True, capture_output=True)
    assert "not yet measured" not in page.read_text()


def test_an_epochs_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the epoch's benchmark, which plain pytest does not run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    world, sizes, engines = map(import_module, ("world", "sizes", "engines"))
    problem = sizes.scale("small", gpu=False).problem.with_(cached=0, bank=8)
    found = world.World(problem, engines.make("fast"), torch.device("cpu"), tmp_path).evaluate()
    assert found.keys() == {"A", "B"}
    assert all(0 <= share <= 1 for share in found.values())
