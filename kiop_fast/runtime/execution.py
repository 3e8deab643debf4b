"""How the fast engine computes: precision, CUDA graphs, compiled regions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kiop_fast.errors import ConfigError


@dataclass(frozen=True)
class Execution:
    """What does not belong to the algorithm but to how a device runs it.

    Attributes:
        precision: how convolutions and matrix products multiply; weights, sums, losses and
            optimisers are fp32 throughout.  ``fp32`` | ``bf16x3`` (the projection head in three
            bfloat16 products) | ``tf32`` (10-bit mantissas, NVIDIA from sm_80) | ``bf16``.
        graphs: on CUDA, capture each step once and replay it.
        compile: put generator and projection head through torch.compile.
    """

    precision: str = "fp32"
    graphs: bool = True
    compile: bool = False

    def check(self, device: torch.device) -> None:
        """Raise ConfigError where ``device`` lacks the precision."""
        has = precisions(device)
        if self.precision not in has:
            raise ConfigError(
                "this device lacks the precision asked for",
                got=f"{self.precision} on {device}",
                expected=f"one of {', '.join(has)}",
                fix=f"set precision={has[-1]}",
            )

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Inside, matrix products and convolutions run at this precision."""
        if self.precision == "bf16":
            # Graphs replay the casts; a cache would hand out tensors of an earlier step.
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                yield
            return
        if device.type != "cuda":
            yield
            return
        flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
        before = [flag.fp32_precision for flag in flags]
        for flag in flags:
            flag.fp32_precision = "tf32" if self.precision == "tf32" else "ieee"
        try:
            yield
        finally:
            for flag, value in zip(flags, before, strict=True):
                flag.fp32_precision = value


PLAIN = Execution()


def precisions(device: torch.device) -> list[str]:
    """What a device can compute with.

    On the CPU ``bf16`` works everywhere and is quick only with avx512_bf16 or amx_bf16;
    ``bf16x3`` would be exact and never quick there.
    """
    if device.type != "cuda":
        return ["fp32", "bf16"]
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return ["fp32", "bf16x3", "tf32", "bf16"] if ampere else ["fp32"]
