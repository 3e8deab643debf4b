"""Versions of what made a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import kiop_fast


def versions() -> dict[str, str]:
    """Version of kiop_fast, Python and the libraries that decide numbers."""
    found = {"kiop_fast": kiop_fast.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "triton", "numpy", "nvidia-dali-cuda130"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
