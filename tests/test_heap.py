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
    """mallopt(M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1, M_MMAP_THRESHOLD = -3).

    Afterwards as where glibc's dynamic thresholds end: DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB, and
    twice that (mallopt(3)).
    """
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
    assert asked[2:] == [(-4, 65536), (-1, 64 << 20), (-3, 32 << 20)]


@fair
def test_a_period_leaves_small_tensors_as_quick_as_before() -> None:
    """8 MiB lie below the thresholds: kept by malloc before and after."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2 << 20).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_heap(CPU):
        faults_of_a_tensor()
    faults()
    assert min(faults() for _ in range(5)) < 200


@pytest.mark.parametrize("reason", ["another C library", "another device", "set by the user"])
def test_elsewhere_nothing_happens(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: str | None) -> None:
        pytest.fail("the C library was touched")

    monkeypatch.setattr("ctypes.CDLL", loaded)
    if reason == "another C library":
        monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    if reason == "set by the user":
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with kept_heap(torch.device("cuda") if reason == "another device" else CPU):
        pass
