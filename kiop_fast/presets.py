"""Named starting points of a run.

``paper-*`` carry the values of the authors' scripts (SPEC section 8) with this project's
corrected defaults; ``upstream`` adds every quirk of the scripts (SPEC section 9); ``demo`` is
what ``kiop-fast train`` runs on a laptop.
"""

from __future__ import annotations

from typing import Any

from kiop_fast.config import RunConfig
from kiop_fast.config_io import from_dict
from kiop_fast.errors import ConfigError, unknown_name

_PAPER: dict[str, Any] = {"target": "resnet18@cifar100", "providers": ["resnet18@mnist"]}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "target": "resnet8@letters",
        "providers": ["resnet8@digits"],
        "side": 16,
        "epochs": 4,
        "prompt": {"rings": [24, 32], "mapping": "likelihood", "mapping_steps": 24},
        "synthesis": {
            "epochs_of_a": 1, "batch": 192, "steps": 72, "start": "meta", "meta_steps": 36,
            "lr": 0.015, "width": 32, "adv": 0.0, "head_width": 256, "negatives": 256, "pad": 1,
            "scale": [0.6, 1.0], "flip": 0.0, "balanced": True,
        },
        "storing": {"steps": 72, "lr": 24.0, "temperature": 1.0, "shuffle_colours": True},
    },
    "paper-bf": {**_PAPER, "mode": "bf"},
    "paper-b": {**_PAPER, "mode": "b"},
    "paper-t": {**_PAPER, "mode": "t", "prompt": {"rings": [128]}},
    "paper-vanilla": {**_PAPER, "mode": "vanilla"},
    "paper-multi": {
        **_PAPER,
        "providers": ["resnet18@mnist", "resnet18@fmnist"],
        "prompt": {"rings": [36, 128, 224]},
    },
    "upstream": {
        **_PAPER,
        "prompt": {"batchnorm": "batch", "disjoint": True, "dropout": True},
        "synthesis": {"normaliser": "provider", "grey": False},
        "evaluation": {"batch": 64},
    },
}  # fmt: skip


def preset(name: str) -> RunConfig:
    """The config of a preset by its name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS, ConfigError)
    return from_dict(RunConfig, {"preset": name, **PRESETS[name]})
