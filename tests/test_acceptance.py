"""The demo as a newcomer runs it: from an empty cache, three seeds, the last epoch.

Started by ``make accept``; takes ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.accept


def test_demo_from_an_empty_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "KIOP_FAST_CACHE": str(tmp_path / "cache")}
    rows = []
    for seed in (0, 1, 2):
        out = tmp_path / f"seed-{seed}"
        if seed == 0:
            assert not (tmp_path / "cache").exists()
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kiop_fast.cli", "train", "--seed", str(seed), "--out", out],
            check=True, env=environment,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        facts = json.loads((out / "evaluation.json").read_text())
        rows.append((seconds, facts))
        print(f"seed {seed}: {seconds:.0f} s")
    letters = [facts["tasks"]["letters"]["accuracy"] for _, facts in rows]
    digits = [facts["tasks"]["digits"]["accuracy"] for _, facts in rows]
    floors = [facts["tasks"]["digits"]["floor"] for _, facts in rows]
    print("letters", letters, "digits", digits, "floor", floors)
    assert rows[0][0] < 240, "sources included, under four minutes"
    assert statistics.mean(letters) >= 0.58
    assert statistics.mean(digits) >= 0.30
    assert statistics.mean(digits) - statistics.mean(floors) >= 0.10
