"""The engines that are compared, and the precision each runs at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import baselines
import compiled
import torch

from kiop_fast.engine import Engine, engine
from kiop_fast.runtime.execution import precisions

ENGINES = ("reference", "tuned", "compile", "fast")
# fp32: nothing less.  tf32: products of 10-bit mantissas.  bf16: products under autocast.
# default: as torch starts and the authors' code leaves it, convolutions in tf32, products in fp32.
PRECISIONS = ("fp32", "tf32", "bf16", "default")


def contestants(device: torch.device) -> list[tuple[str, str]]:
    """(engine, precision) of every row, in the order they are timed: compiling comes last.

    The reference runs as the authors' code leaves torch, tuned and compiled code at tf32 where
    there is such a thing, the fast engine at every precision it has.
    """
    gpu = device.type == "cuda"
    reference, tuned = ("default", "tf32") if gpu else ("fp32", "fp32")
    fast = [("fast", precision) for precision in precisions(device)]
    return [("reference", reference), *fast, ("tuned", tuned), ("compile", tuned)]


def make(name: str) -> Engine:
    """A new engine of that name."""
    if name in ("reference", "fast"):
        return engine(name)
    return baselines.tuned() if name == "tuned" else compiled.compile_()


@contextmanager
def running_at(precision: str, engine: str = "reference") -> Iterator[None]:
    """Inside, torch's flags stand at one of ``PRECISIONS``.

    What the fast engine computes with is its own setting; bf16 leaves the flags at fp32.  Tuned and
    compiled code also let cudnn search for its algorithms, which the fast engine does by itself.
    """
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    searched = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = engine in ("tuned", "compile")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "default")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.backends.cudnn.benchmark = searched
