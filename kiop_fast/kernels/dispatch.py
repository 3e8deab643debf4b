"""Which backend runs an operation, and proof that it ran.

``KIOP_FAST_KERNELS`` = ``auto`` (default) | ``torch`` | ``triton``:

- ``auto``: CUDA tensors go to the Triton kernels, everything else to the eager twins;
- ``torch``: always the eager twins;
- ``triton``: always the Triton kernels.  Without a GPU this is an error, never a silent fallback,
  unless the process was started with ``TRITON_INTERPRET=1`` (Triton's CPU interpreter).

The variable is read at every call; under ``torch.compile`` it is read once, while tracing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kiop_fast.errors import KernelError, unknown_name

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the eager twins need none
    triton = None
    tl = None

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "KIOP_FAST_KERNELS"

# Triton decides at decoration time, so this is settled when the kernels are imported.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton 3.10 turns multiply-add fusion off by default; kernels here are measured with it on.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

_launches: Counter[str] = Counter()


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit`` where Triton is installed; the undecorated function elsewhere."""
    return function if triton is None else triton.jit(function)


def _triton_wanted(op: str, device_type: str, unsupported: str) -> bool:
    request = os.environ.get(VARIABLE, "auto")
    if request not in BACKENDS:
        raise unknown_name(f"{VARIABLE} value", request, BACKENDS, KernelError)
    if request == "torch":
        return False
    possible = triton is not None and (device_type == "cuda" or INTERPRETED)
    if request == "auto":
        return possible and device_type == "cuda" and not unsupported
    if not possible:
        raise KernelError(
            f"{VARIABLE}=triton cannot be honoured for {op}",
            got="no Triton installed" if triton is None else f"a tensor on {device_type!r}",
            expected="a CUDA tensor, or TRITON_INTERPRET=1 in the environment at start",
            fix=f"unset {VARIABLE}, or set it to auto or torch",
        )
    if unsupported:
        raise KernelError(
            f"the Triton kernel of {op} cannot take these arguments",
            got=unsupported,
            fix=f"unset {VARIABLE} to let the eager twin take them",
        )
    return True


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, which
# takes as long as torch itself, in every process that never compiles.
_triton_wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_triton(op: str, *tensors: Tensor, unsupported: str = "") -> bool:
    """Whether ``op`` runs its Triton kernels on these tensors.

    Args:
        op: name of the operation, for messages.
        tensors: floating-point arguments; the first one's device decides.
        unsupported: why the kernel cannot take these arguments although the eager twin can
            (empty: it can).  ``auto`` then uses the twin, an explicit ``triton`` is an error.

    Raises:
        KernelError: unknown ``KIOP_FAST_KERNELS``, or ``triton`` cannot be honoured.
    """
    if not unsupported and any(t.dtype not in KERNEL_DTYPES for t in tensors):
        unsupported = f"dtypes {[str(t.dtype) for t in tensors]}; kernels take fp32, bf16, fp16"
    return _triton_wanted(op, tensors[0].device.type, unsupported)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches a ``jit`` kernel on the GPU of its first tensor and counts it by its name.

    Every launcher goes through here, so that counts are complete and so that a test can take the
    place of the device: it replaces this function, calls the launchers with meta tensors and
    compiles what they would have launched.
    """
    _launches[kernel.fn.__name__] += 1
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **COMPILE_OPTIONS, **meta)


def launches() -> dict[str, int]:
    """Launches since the last reset, by kernel name (one a capture inside a CUDA graph)."""
    return dict(_launches)


def reset_launches() -> None:
    """Sets every launch count to zero."""
    _launches.clear()


def require_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises KernelError unless all given tensors live on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise KernelError(
            f"{op}: arguments live on different devices",
            got=", ".join(f"{name} on {device}" for name, device in devices.items()),
            expected="one device for all",
            fix="move them together with .to(device)",
        )


def require_floating(op: str, **tensors: Tensor) -> None:
    """Raises KernelError unless all given tensors are real floating point."""
    wrong = {name: t.dtype for name, t in tensors.items() if not t.dtype.is_floating_point}
    if wrong:
        raise KernelError(
            f"{op}: arguments must be floating point",
            got=", ".join(f"{name} {dtype}" for name, dtype in wrong.items()),
            expected="float32, bfloat16, float16 or float64",
        )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32 for half precisions and fp32, fp64 as soon as one tensor is fp64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def on_host(table: Tensor) -> bool:
    """Whether the numbers in a table can be looked at without waiting for a device."""
    return table.is_cpu and not torch.compiler.is_compiling()
