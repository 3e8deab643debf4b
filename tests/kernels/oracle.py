"""What every kernel test shares: where kernels run, random cotangents, and the tolerance.

Kernel tests are named ``test_kernel_…``.  They run on a GPU where there is one; otherwise
``test_interpreter.py`` runs them in a process of their own under Triton's interpreter, fp32 only
(its bf16 dot returns rubbish).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from kiop_fast.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]

runs_kernels = pytest.mark.skipif(
    not (ON_GPU or dispatch.INTERPRETED), reason="test_interpreter.py runs this in its own process"
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")

many_examples = settings(derandomize=True, deadline=None, database=None, max_examples=60)
some_examples = settings(derandomize=True, deadline=None, database=None, max_examples=12)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone, on the test device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def results(
    function: Callable[..., Sequence[Tensor] | Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    differentiable: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Outputs and gradients in fp64 of ``function(*inputs)`` run at ``dtype``.

    Floating-point inputs are cast to ``dtype`` keeping their strides; those named in
    ``differentiable`` get gradients for cotangents drawn from ``seed``.
    """
    arguments = [at_dtype(t, dtype) for t in inputs]
    leaves = [arguments[k].requires_grad_() for k in differentiable]
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = {f"output {k}": out.detach().double() for k, out in enumerate(outputs)}
    smooth = [out for out in outputs if out.requires_grad]
    if smooth:
        cotangents = [
            draw(seed + 7919 * k, *out.shape).to(out.dtype) for k, out in enumerate(smooth)
        ]
        grads = torch.autograd.grad(smooth, leaves, cotangents)
        found |= {f"gradient {k}": g.double() for k, g in zip(differentiable, grads, strict=True)}
    return found


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of ``step``, warmed up on a side stream, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def at_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy at ``dtype`` with the very strides of ``tensor``; integers stay what they are."""
    if not tensor.dtype.is_floating_point:
        return tensor
    once = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:  # expanded: one element stands for the whole dimension
            once = once.narrow(dim, 0, 1)
    span = 1 + sum((n - 1) * s for n, s in zip(once.shape, once.stride(), strict=True))
    copy = once.new_zeros(span, dtype=dtype).as_strided(once.shape, once.stride())
    return copy.copy_(once).expand(tensor.shape)


def assert_as_good_as_eager(
    ours: Mapping[str, Tensor],
    eager: Sequence[Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """|ours - exact| <= max(2 · eager's own error, 4 ulp), the largest element of each tensor.

    ``eager`` holds one run or several that make the same sums in other orders, where the error of
    one order is a matter of luck.  An ulp is taken at the largest |exact|.
    """
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        error = _error(ours[name], truth)
        own = max(_error(run[name], truth) for run in eager)
        ulp = torch.finfo(dtype).eps * _largest(truth)
        assert error <= max(2 * own, 4 * ulp), (
            f"{name}: error {error:.3g}, eager's own {own:.3g}, an ulp {ulp:.3g}"
        )


def _error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape, f"{tuple(found.shape)} is not {tuple(truth.shape)}"
    same = (found == truth) | (found.isnan() & truth.isnan())
    return torch.where(same, 0, (found - truth).abs()).amax().item()


def _largest(truth: Tensor) -> float:
    return torch.where(truth.isfinite(), truth, 0).abs().amax().item()
