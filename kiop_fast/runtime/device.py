"""Where a run computes: the device and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kiop_fast.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA when it is there; ``cpu``, ``cuda`` and ``cuda:N`` are taken as said."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        known = "auto, cpu, cuda or cuda:N"
        raise ConfigError("unknown device", got=name, expected=known) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "CUDA was asked for, but torch sees no GPU",
            got=name,
            expected="a visible NVIDIA GPU and a CUDA build of torch",
            fix="set device=auto or device=cpu",
        )
    return device


def use_threads(count: int) -> int:
    """Let torch use ``count`` CPU threads (0: leave its choice); the number in use."""
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses ``count`` CPU threads (0: as outside)."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
