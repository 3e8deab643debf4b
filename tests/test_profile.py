"""Where the time of a step goes: operations counted by stage, steps traced."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from small_periods import parts

from kiop_fast.runtime.profile import Counter as Operations
from kiop_fast.runtime.profile import StepProfiler, stage

CPU = torch.device("cpu")


def test_profile_counts_and_times_stages(tmp_path: Path) -> None:
    a, b = torch.ones(16, 32), torch.ones(32, 8)
    counter = Operations()
    with counter, stage("product"):
        _ = a @ b
    assert counter.flops == {"product": 2 * 16 * 32 * 8}
    assert counter.bytes["product"] == 4 * (16 * 32 + 32 * 8 + 16 * 8)

    between = 0.2
    _, _, _, synthesize, _ = parts(CPU, steps=10)
    profiler = StepProfiler(tmp_path / "profile", "synthesize b", lambda *_: time.sleep(between))
    profiler.start()
    synthesize(0, profiler)
    rows = profiler.rows()
    names = [name for name, *_ in rows]
    assert {"generator", "views", "teacher", "student", "contrastive", "backward"} < set(names)
    assert names[-1] == "step"
    assert sum(ms for name, ms, *_ in rows[:-1]) <= rows[-1][1]
    assert rows[-1][1] < 1000 * between  # a step's own time, not that of what comes between steps
    assert (tmp_path / "profile" / "synthesize b.json").stat().st_size > 1000
