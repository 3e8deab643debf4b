"""Memory of a period's steps: its pages are mapped once."""

from __future__ import annotations

import platform
import resource
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kiop_fast.runtime.heap import kept_heap

CPU = torch.device("cpu")
PAGES = 40 << 20 >> 12  # of the tensor below

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
fair = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or (HUGE.exists() and "[always]" in HUGE.read_text()),
    reason="needs glibc and pages of 4 KiB",
)


def faults_of_a_tensor() -> int:
    """Pages first touched by making, filling and dropping 40 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(10 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@fair
def test_freed_memory_serves_the_next_tensor() -> None:
    with kept_heap(CPU):
        faults_of_a_tensor()
        assert min(faults_of_a_tensor() for _ in range(5)) < PAGES / 10


def test_the_first_context_sets_and_the_last_puts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """mallopt(M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1); glibc's defaults: 65536 and 128 KiB."""
    asked: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            asked.append((option, value))

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    with suppress(KeyError), kept_heap(CPU):
        with kept_heap(CPU):
            assert asked == [(-4, 0), (-1, -1)]
        assert len(asked) == 2
        raise KeyError
    assert asked[2:] == [(-4, 65536), (-1, 128 * 1024)]


@pytest.mark.parametrize("reason", ["another C library", "another device"])
def test_elsewhere_nothing_happens(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: str | None) -> None:
        pytest.fail("the C library was touched")

    monkeypatch.setattr("ctypes.CDLL", loaded)
    if reason == "another C library":
        monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    with kept_heap(CPU if reason == "another C library" else torch.device("cuda")):
        pass
