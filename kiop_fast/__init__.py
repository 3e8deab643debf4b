"""kiop_fast: the knowledge of several trained models in one prompt, without their data."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kiop_fast.config import RunConfig as RunConfig
    from kiop_fast.deliver.evaluate import evaluate as evaluate
    from kiop_fast.deliver.predict import predict as predict
    from kiop_fast.dropin.patching import accelerate_upstream as accelerate_upstream
    from kiop_fast.errors import KiopError as KiopError
    from kiop_fast.library import Callback as Callback
    from kiop_fast.library import KiOP as KiOP
    from kiop_fast.pipeline import train as train
    from kiop_fast.presets import preset as preset
    from kiop_fast.prompt.artefact import load_prompt as load_prompt
    from kiop_fast.prompt.artefact import save_prompt as save_prompt
    from kiop_fast.source import freeze as freeze
    from kiop_fast.sources import Sources as Sources

# Public names and where they live; imported on first use, so that the package itself is light.
_PUBLIC = {
    "Callback": "kiop_fast.library",
    "KiOP": "kiop_fast.library",
    "KiopError": "kiop_fast.errors",
    "RunConfig": "kiop_fast.config",
    "Sources": "kiop_fast.sources",
    "accelerate_upstream": "kiop_fast.dropin.patching",
    "evaluate": "kiop_fast.deliver.evaluate",
    "freeze": "kiop_fast.source",
    "load_prompt": "kiop_fast.prompt.artefact",
    "predict": "kiop_fast.deliver.predict",
    "preset": "kiop_fast.presets",
    "save_prompt": "kiop_fast.prompt.artefact",
    "train": "kiop_fast.pipeline",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
