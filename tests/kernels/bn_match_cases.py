"""What the tests of bn_match share: layers and layouts, gradients, two checks of any function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import draw
from torch import Tensor

EPS = 1e-5
# name: shape of x, rows, relu, affine, layout
CASES: dict[str, tuple[tuple[int, int, int, int], int | None, bool, bool, str]] = {
    "power of two": ((8, 16, 8, 8), None, False, True, "contiguous"),
    "one image": ((1, 5, 31, 33), 1, True, True, "contiguous"),
    "channels-last, rows < N": ((4, 43, 9, 5), 3, True, True, "channels_last"),
    "one pixel, many channels": ((37, 600, 1, 1), 20, False, True, "contiguous"),
    "no affine": ((3, 5, 7, 7), 1, False, False, "contiguous"),
    "every second channel": ((3, 5, 7, 7), 2, True, True, "strided"),
    "transposed": ((3, 2, 6, 5), 2, False, True, "transposed"),
    "one channel": ((2, 1, 4, 4), None, True, True, "channels_last"),
}


def make(case: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Any, ...]:
    """x, running_mean, running_var, weight, bias and the keywords of a case."""
    (n, c, h, w), rows, relu, affine, layout = CASES[case]
    generator = torch.Generator().manual_seed(sum(map(ord, case)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(n, c, h, w) * 2 + normal(1, c, 1, 1)
    mean, var = x.mean((0, 2, 3)) + 0.3 * normal(c), normal(c).square() + 0.5
    vectors = [mean, var, normal(c) + 1, normal(c)] if affine else [mean, var, None, None]
    x, *vectors = (None if t is None else t.to(dtype).to(device) for t in (x, *vectors))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return (x, *vectors), {"rows": rows, "relu": relu}


def with_gradient(
    function: Any, inputs: tuple[Any, ...], options: dict[str, Any], which: tuple[int, ...]
) -> list[Tensor]:
    """The three results and dx for the same random cotangents of the results in ``which``."""
    x = inputs[0].detach().requires_grad_()
    found = function(x, *inputs[1:], EPS, **options)
    cotangents = [draw(k, *out.shape, dtype=out.dtype).to(x.device) for k, out in enumerate(found)]
    (grad,) = torch.autograd.grad([found[i] for i in which], x, [cotangents[i] for i in which])
    return [*(out.detach() for out in found), grad]


def assert_layout_is_kept(function: Any, device: str) -> None:
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    for case, layout in (("one image", contiguous), ("channels-last, rows < N", channels_last)):
        inputs, options = make(case, torch.float32, device)
        output, _, _, grad = with_gradient(function, inputs, options, (0, 1, 2))
        assert output.is_contiguous(memory_format=layout)
        assert grad.is_contiguous(memory_format=layout)


def check_zero_variance(function: Any, dtype: torch.dtype, device: str) -> None:
    """A constant input, 1 above a mean of 2, where a variance of 4 was expected, 9 channels.

    δ = 1 and v - s = -4 everywhere: loss = √9 + √(9 · 16) = 15; its slope by a pixel is
    δ/‖δ‖/n = 1/(3n), and none through v, whose slope is that pixel's distance from the mean.
    """
    x = torch.full((2, 9, 4, 4), 3.0, dtype=dtype, device=device, requires_grad=True)
    mean, var = x.new_full((9,), 2.0).detach(), x.new_full((9,), 4.0).detach()
    found = function(x, mean, var, None, None, 0.0)
    (grad,) = torch.autograd.grad(found.loss, x)
    assert found.loss.item() == pytest.approx(15, rel=1e-6)
    torch.testing.assert_close(found.output, torch.full_like(x, 0.5))
    torch.testing.assert_close(found.image_means, torch.full_like(x[:, :, 0, 0], 3.0))
    torch.testing.assert_close(grad, torch.full_like(x, 1 / (3 * 32)))
