"""The heap of a period on a CPU: memory that one step frees serves the next."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

# mallopt's names and glibc's defaults (malloc.h).
_TRIM_THRESHOLD, _TRIMMED = -1, 128 * 1024
_MMAP_MAX, _MAPPINGS = -4, 65536
_NEVER = -1

_lock = Lock()
_inside = 0


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Inside, freed memory stays with the process, its pages mapped for the next tensor.

    glibc by itself maps each large tensor anew and unmaps it when it is freed, so every step meets
    its pages for the first time: a copy of 40 MB takes 41 ms instead of 3.  After the outermost of
    nested contexts malloc gives memory back again as it is freed.  Nothing happens for another
    device or C library.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """One context more or less; the first sets malloc's options, the last puts them back."""
    global _inside
    with _lock:
        before, _inside = _inside, _inside + change
        if not before or not _inside:
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_MAX, 0 if _inside else _MAPPINGS)
            libc.mallopt(_TRIM_THRESHOLD, _NEVER if _inside else _TRIMMED)
