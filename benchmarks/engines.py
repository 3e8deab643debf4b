"""The engines that are compared, and the precision each runs at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import baselines
import torch

from kiop_fast.engine import Engine, engine

ENGINES = ("reference", "tuned", "compile", "fast")
# fp32: nothing less.  tf32: products and convolutions of fp32 on tensor cores.  default: as torch
# starts and the authors' code leaves it, convolutions in tf32, products in fp32.
PRECISIONS = ("fp32", "tf32", "default")


def contestants(*, gpu: bool) -> list[tuple[str, str]]:
    """(engine, precision) of every row; a CPU knows fp32 only."""
    if not gpu:
        return [(name, "fp32") for name in ENGINES]
    return [
        ("reference", "default"), ("tuned", "tf32"), ("compile", "tf32"), ("fast", "fp32"),
        ("fast", "tf32"),
    ]  # fmt: skip


def make(name: str) -> Engine:
    """A new engine of that name."""
    if name in ("reference", "fast"):
        return engine(name)
    return baselines.tuned() if name == "tuned" else baselines.compile_()


@contextmanager
def running_at(precision: str) -> Iterator[None]:
    """Inside, fp32 products and convolutions run at one of ``PRECISIONS``."""
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
