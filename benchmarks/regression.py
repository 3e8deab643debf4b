"""``python benchmarks/regression.py ROWS``: has a stage lost speed against the reference?

Compares ratios within one run (the reference's fastest call over the fast engine's), never absolute
times, with the ratios in ``baseline.json``.  A stage fails where its ratio fell below ``KEEP`` of
the recorded one.  ``--update`` records the ratios of ROWS as the new baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kiop_fast.bench import Record, read_records

BASELINE = Path(__file__).parent / "baseline.json"
# Of a recorded ratio: fastest calls on busy cores scatter, a lost optimisation costs more.
KEEP = 0.7


def ratios(records: list[Record]) -> dict[str, float]:
    """reference / fast by stage and precision of the fast row, from the fastest call of each.

    bf16 is left out: what it brings depends on the processor more than on the code.
    """
    rows = [record for record in records if record["kind"] == "row"]
    slow = {(r["scale"], r["stage"]): r for r in rows if r["engine"] == "reference"}
    found = {}
    for row in rows:
        base = slow.get((row["scale"], row["stage"]))
        if row["engine"] != "fast" or row["precision"] == "bf16" or base is None:
            continue
        if base["digest"] == row["digest"]:
            name = f"{row['scale']}: {row['stage']} ({row['precision']})"
            found[name] = base["min"] / row["min"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    asked = parser.parse_args()
    now = ratios(read_records(asked.rows))
    before = json.loads(asked.baseline.read_text()) if asked.baseline.exists() else {}
    if asked.update:
        kept = before | {name: round(value, 3) for name, value in now.items()}
        asked.baseline.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        return
    known = [name for name in now if name in before]
    for name in known:
        verdict = "slower" if now[name] < KEEP * before[name] else "ok"
        print(f"{verdict:7} {name}: {now[name]:.2f}× the reference, recorded {before[name]:.2f}×")
    if not known:
        sys.exit("no stage of this run is in the baseline: time both reference and fast")
    if any(now[name] < KEEP * before[name] for name in known):
        sys.exit(1)


if __name__ == "__main__":
    main()
