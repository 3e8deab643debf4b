"""How the fast engine computes: precision, CUDA graphs, compiled regions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from kiop_fast.errors import ConfigError
from kiop_fast.runtime.offload import SharedPlace
from kiop_fast.runtime.static_step import Scratch

AS_SET = "as set"


@dataclass(frozen=True)
class Execution:
    """What does not belong to the algorithm but to how a device runs it.

    Attributes:
        precision: how convolutions and matrix products multiply; weights, sums, losses and
            optimisers are fp32 throughout.  ``fp32`` | ``bf16x3`` (the projection head in three
            bfloat16 products) | ``tf32`` (10-bit mantissas, NVIDIA from sm_80) | ``bf16``;
            ``as set`` leaves torch's own flags as its user set them.
        graphs: on CUDA, capture each step once and replay it.
        compile: put generator and projection head through torch.compile.
        scratch: stream and memory that all captured steps of a run share; None: each owner of
            steps has its own.
        place: where projection heads and feature banks lie in turns; None: each has its own.
    """

    precision: str = "fp32"
    graphs: bool = True
    compile: bool = False
    scratch: Scratch | None = field(default=None, compare=False, repr=False)
    place: SharedPlace | None = field(default=None, compare=False, repr=False)

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
    def products(self, device: torch.device, *, search: bool = False) -> Iterator[None]:
        """Inside, forward and backward, fp32 products and convolutions are TF32 or nothing less.

        A caller's own autocast has no part in it, unless precision is ``as set``.

        Args:
            search: cudnn times its algorithms for every new convolution and keeps the fastest: for
                steps that are done over and over.  Not where torch was told to be deterministic.
        """
        with ExitStack() as stack:
            if self.precision != AS_SET:
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(self._flags(search=search))
            yield

    @contextmanager
    def _flags(self, *, search: bool) -> Iterator[None]:
        """cudnn's search and TF32."""
        cudnn, before = torch.backends.cudnn, _tf32()
        searched = cudnn.benchmark
        deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        cudnn.benchmark = searched or (search and not deterministic)
        if self.precision != AS_SET:
            _use_tf32(self.precision == "tf32", self.precision == "tf32")
        try:
            yield
        finally:
            cudnn.benchmark = searched
            if self.precision != AS_SET:
                _use_tf32(*before)

    def factors(self, dtype: torch.dtype) -> torch.dtype:
        """What a product's factors become that come as ``dtype``."""
        return torch.bfloat16 if self.precision == "bf16" else dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around a forward pass: its products and convolutions in bfloat16 if that is asked for."""
        if self.precision != "bf16":
            return nullcontext()
        # Graphs replay the casts; a cache would hand out tensors of an earlier step.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


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


def _tf32() -> tuple[bool, bool]:
    """Whether products and convolutions are TF32 now; torch's new names always answer."""
    cudnn: Any = torch.backends.cudnn
    found = [flag.fp32_precision == "tf32" for flag in (torch.backends.cuda.matmul, cudnn.conv)]
    return found[0], found[1]


def _use_tf32(products: bool, convolutions: bool) -> None:
    """By torch's old names, which set the new ones too.

    Compiled code reads the old ones, and they refuse to answer where the two differ.
    """
    torch.set_float32_matmul_precision("high" if products else "highest")
    torch.backends.cudnn.allow_tf32 = convolutions
