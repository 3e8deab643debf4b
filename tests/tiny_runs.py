"""Settings of runs that take a second or two."""

from __future__ import annotations

from typing import Any

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override

TINY: dict[str, Any] = {
    "side": 16,
    "epochs": 2,
    "threads": 1,
    "device": "cpu",
    "prompt": {"rings": [20, 28], "mapping": "iterative", "calibration_batch": 16},
    "synthesis": {"batch": 16, "steps": 3, "width": 8, "latent": 16, "head_width": 16,
                  "head_dim": 8, "pad": 1},
    "storing": {"steps": 3, "batch": 8, "batch_real": 8, "lr": 1.0, "temperature": 4.0},
    "evaluation": {"every": 0},
}  # fmt: skip


def tiny(**changes: Any) -> RunConfig:
    """A run of a second or two."""
    base = override(RunConfig(), {"target": "resnet8@letters", "providers": ["resnet8@digits"]})
    return override(override(base, TINY), changes)
