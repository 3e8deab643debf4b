"""Shared fixtures: two small frozen sources with random but lived-in weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kiop_fast.data import dataset
from kiop_fast.runtime import draws
from kiop_fast.source import Source, freeze
from kiop_fast.source.zoo import build


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """``pytest --benchmark-only`` looks into ``benchmarks/`` alone."""
    return True if config.getoption("benchmark_only", default=False) else None


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Fixed thread count: sums are then made in the same order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture
def double() -> Iterator[None]:
    """Inside, new tensors are fp64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_source(arch: str, data: str, side: int, seed: int = 0) -> Source:
    """An untrained source whose BatchNorm layers have seen noise, so that none is the identity."""
    info = dataset(data).info
    model = build(arch, len(info.classes), side, seed=seed)
    noise = draws.normal(draws.generator(seed, 0, data, f"test {arch}"), 32, 3, side, side)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(noise)
    return freeze(model, info, name=f"{arch}@{data}", arch=arch)


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Source]:
    """``make_source(arch, data, side, seed=0)``, cached over the session."""
    made: dict[tuple[str, str, int, int], Source] = {}

    def make(arch: str, data: str, side: int = 16, seed: int = 0) -> Source:
        key = (arch, data, side, seed)
        if key not in made:
            made[key] = random_source(*key)
        return made[key]

    return make
