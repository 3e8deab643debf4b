"""The heap of a period on a CPU: memory that one step frees serves the next."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

# mallopt's names (malloc.h), what they are inside, and where glibc's own adaptation ends: the
# values before cannot be read.
_TRIM_THRESHOLD, _NEVER, _TRIMMED = -1, -1, 64 << 20
_MMAP_THRESHOLD, _MAPPED = -3, 32 << 20
_MMAP_MAX, _MAPPINGS = -4, 65536
_OWN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")

_lock = Lock()
_inside = 0


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Inside, freed memory stays with the process, its pages mapped for the next tensor.

    glibc by itself maps each large tensor (from 32 MiB at the latest) anew and unmaps it when it
    is freed, so every step meets its pages for the first time (docs/engine.md).  After the
    outermost of nested contexts large tensors are mapped again, and what lies free at the heap's
    end goes back.  Nothing happens for another device or C library, or where the environment
    sets these options of malloc.
    """
    own = any(name in os.environ for name in _OWN)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or own:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """One context more or less; the first sets malloc's options, the last undoes it."""
    global _inside
    with _lock:
        before, _inside = _inside, _inside + change
        if not before or not _inside:
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_MAX, 0 if _inside else _MAPPINGS)
            libc.mallopt(_TRIM_THRESHOLD, _NEVER if _inside else _TRIMMED)
            if not _inside:
                libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
