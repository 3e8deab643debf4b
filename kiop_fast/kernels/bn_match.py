"""bn_match: one read of a BatchNorm input → its output, its matching loss, its image means.

A frozen teacher's BatchNorm layer in eval mode, with its terms of the inversion loss (SPEC
section 4.4; DeepInversion's feature regularisation) and of the contrastive feature (section 4.5).
For channel c with running statistics r_c, s_c and n = rows · H · W:

    output[i,c,p] = (x[i,c,p] - r_c) · weight_c / sqrt(s_c + eps) + bias_c,  then ReLU if asked
    δ_c           = Σ_{i<rows, p} (x[i,c,p] - r_c) / n                       mean_c - r_c
    v_c           = Σ_{i<rows, p} (x[i,c,p] - r_c)² / n - δ_c²               biased variance
    loss          = ‖δ‖₂ + ‖v - s‖₂                                          over the channels
    image_means   = r_c + Σ_p (x[i,c,p] - r_c) / HW

Sums run around r_c, where a matched layer's mean lies, so that nothing cancels.  With the
cotangents g, λ and μ of the three outputs, ‖·‖₂ having subgradient 0 at 0:

    dx[i,c,p] = g · weight_c / sqrt(s_c + eps)                               (0 where ReLU cut)
              + μ[i,c] / HW
              + [i < rows] λ (δ_c/‖δ‖ + 2 (x[i,c,p] - mean_c) (v_c - s_c)/‖v - s‖) / n

    x, output (N, C, H, W);  image_means (N, C);  loss ();  running statistics, affine (C,)
    bytes     forward 2 passes over x (one read, one write), backward 3 (two reads, one write)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch
from kiop_fast.kernels.bn_match_triton import dense, empty_results, launch_bwd, launch_fwd


class BnMatch(NamedTuple):
    """What ``bn_match`` reads off one BatchNorm input of N images and C channels."""

    output: Tensor  # (N, C, H, W), x's dtype: the layer's eval-mode output
    loss: Tensor  # (), fp32 (fp64 for fp64): ‖mean - running_mean‖₂ + ‖var - running_var‖₂
    image_means: Tensor  # (N, C), fp32 (fp64 for fp64): spatial means of x


def bn_match_eager(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rows: int | None = None,
    relu: bool = False,
) -> BnMatch:
    """The same in plain torch, with its gradient written out.

    Measured on one core, fp32, batches of 64 to 400 of 4 × 4 to 64 × 64: forward + backward take
    1.1 to 2.1 times the BatchNorm alone and 0.26 to 0.5 of the built-ins and autograd for the
    three results; on 1 × 1 images 4 times and 1.0.
    """
    rows = x.shape[0] if rows is None else rows
    return BnMatch(*_Twin.apply(x, running_mean, running_var, weight, bias, eps, rows, relu))


def _forward_eager(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, loss, image_means, slopes): slopes (3, C) are δ, and the loss by mean and by var."""
    acc = dispatch.accumulation_dtype(x)
    pixels = x.shape[2] * x.shape[3]
    shift, var = running_mean.to(acc), running_var.to(acc)
    centred = x.to(acc) - shift[:, None, None]
    offsets = centred.mean((2, 3))
    squares = centred[:rows].square().sum((2, 3))  # vector_norm: 2 to 20 times as slow
    delta = offsets[:rows].mean(0)
    excess = squares.mean(0) / pixels - delta.square() - var
    from_mean, from_var = delta.norm(), excess.norm()
    by_mean = torch.where(from_mean > 0, delta / (from_mean * rows * pixels), 0.0)
    by_var = torch.where(from_var > 0, excess * 2 / (from_var * rows * pixels), 0.0)
    output = centred.mul_(_scale(var, weight, eps)[:, None, None])
    if bias is not None:
        output = output.add_(bias.to(acc)[:, None, None])
    if relu:
        output = output.relu_()
    output = output.to(x.dtype)
    if torch.compiler.is_compiling():
        # torch 2.11 traces an autograd.Function whose result was made in place without that
        # result's gradient; 2.15 does not, and Inductor fuses the copy away.
        output = output.clone()
    slopes = torch.stack([delta, by_mean, by_var])
    return output, from_mean + from_var, offsets + shift, slopes


def _scale(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    inverse = (running_var + eps).rsqrt()
    return inverse if weight is None else inverse * weight.to(inverse.dtype)


def _backward_eager(
    grad_output: Tensor | None, grad_loss: Tensor | None, grad_means: Tensor | None, x: Tensor,
    output: Tensor | None, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, slopes: Tensor, eps: float, rows: int, relu: bool,
) -> Tensor:  # fmt: skip
    """dx; where a ReLU made ``output``, its zeros stop ``grad_output``."""
    acc = slopes.dtype
    pixels = x.shape[2] * x.shape[3]
    if grad_output is None:
        grad = torch.zeros_like(x, dtype=acc)
    else:
        grad = grad_output.to(acc)
        if relu:
            assert output is not None
            grad = torch.ops.aten.threshold_backward(grad, output.to(acc), 0)
        grad = grad * _scale(running_var.to(acc), weight, eps)[:, None, None]
    level = grad.new_zeros(x.shape[:2]) if grad_means is None else grad_means / pixels
    if grad_loss is not None:
        mean = running_mean.to(acc) + slopes[0]
        by_mean, by_var = (slopes[1:] * grad_loss).unbind(0)
        level = torch.cat([level[:rows] + (by_mean - by_var * mean), level[rows:]])
        grad[:rows].addcmul_(x[:rows].to(acc), by_var[:, None, None])
    return grad.add_(level[:, :, None, None]).to(x.dtype)


class _Twin(torch.autograd.Function):
    """The eager twin's gradient; torch.compile traces through it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = _forward_eager(*inputs)
        _setup_context(ctx, inputs, results)
        return results[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        return _backward_eager(*cotangents, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, rows, relu = inputs
    result, _, _, slopes = output
    x, *layer = tensors
    ctx.save_for_backward(x, result if relu else None, *layer, slopes)
    ctx.numbers = eps, rows, relu
    ctx.set_materialize_grads(False)


@torch.library.custom_op("kiop_fast::bn_match", mutates_args=())
def _bn_match(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    forward = (
        launch_fwd if _use_triton(x, running_mean, running_var, weight, bias) else _forward_eager
    )
    return forward(dense(x)[0], running_mean, running_var, weight, bias, eps, rows, relu)


@_bn_match.register_fake
def _(x, running_mean, running_var, weight, bias, eps, rows, relu):  # type: ignore[no-untyped-def]
    return empty_results(dense(x)[0])


@torch.library.custom_op("kiop_fast::bn_match_backward", mutates_args=())
def _bn_match_backward(
    grad_output: Tensor | None, grad_loss: Tensor | None, grad_means: Tensor | None, x: Tensor,
    output: Tensor | None, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, slopes: Tensor, eps: float, rows: int, relu: bool,
) -> Tensor:  # fmt: skip
    x = dense(x)[0]
    layer = (running_mean, running_var, weight, bias)
    if _use_triton(x, *layer):  # sees the ReLU's cut in x, which it reads anyway
        return launch_bwd(grad_output, grad_loss, grad_means, x, *layer, slopes, eps, rows, relu)
    grad = _backward_eager(
        grad_output, grad_loss, grad_means, x, output, *layer, slopes, eps, rows, relu
    )
    return torch.empty_like(x).copy_(grad)


@_bn_match_backward.register_fake
def _(grad_output, grad_loss, grad_means, x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(dense(x)[0])


def _backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
    # The last cotangent is that of the slopes, which nobody outside sees.
    grad = _bn_match_backward(*cotangents[:3], *ctx.saved_tensors, *ctx.numbers)
    return grad, *[None] * 7


_bn_match.register_autograd(_backward, setup_context=_setup_context)


def _use_triton(*tensors: Tensor | None) -> bool:
    return dispatch.use_triton("bn_match", *(t for t in tensors if t is not None))


def bn_match(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rows: int | None = None,
    relu: bool = False,
) -> BnMatch:
    """Reads a frozen BatchNorm layer's input once for everything synthesis wants of it.

    Args:
        x: (N, C, H, W), the layer's input; gradients flow into it through all three results.
        running_mean: (C,), the frozen statistics; they and the affine get no gradient.
        running_var: (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to ``running_var``.
        rows: the loss's batch statistics are those of the first ``rows`` images (all by default).
        relu: apply a ReLU to the output.

    Returns:
        BnMatch: output (N, C, H, W), loss () and image_means (N, C).

    Raises:
        KernelError: shapes, dtypes, devices or ``rows`` that do not fit.
    """
    rows = x.shape[0] if rows is None else rows
    _check(x, running_mean, running_var, weight, bias, eps, rows)
    inputs = (x, running_mean, running_var, weight, bias, eps, rows, relu)
    if _use_triton(x, running_mean, running_var, weight, bias):
        return BnMatch(*_bn_match(*inputs)[:3])
    return BnMatch(*_Twin.apply(*inputs))


def _check(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: int,
) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise KernelError(
            "bn_match reads the input of a 2-d BatchNorm layer",
            got=f"x {tuple(x.shape)}",
            expected="(N, C, H, W), none of them 0",
        )
    named = {"running_mean": running_mean, "running_var": running_var}
    named |= {k: t for k, t in (("weight", weight), ("bias", bias)) if t is not None}
    wrong = {name: tuple(t.shape) for name, t in named.items() if t.shape != (x.shape[1],)}
    if wrong:
        raise KernelError(
            "bn_match: the layer's vectors do not fit its input",
            got=f"{wrong} for x {tuple(x.shape)}",
            expected=f"({x.shape[1]},) each, one number a channel",
        )
    if not 1 <= rows <= x.shape[0]:
        raise KernelError(
            "bn_match: rows counts the images whose statistics are matched",
            got=f"rows {rows} of {x.shape[0]} images",
            expected=f"1 to {x.shape[0]}",
        )
    if eps < 0:
        raise KernelError("bn_match: eps must not be negative", got=eps, expected="0 or more")
    dispatch.require_floating("bn_match", x=x, **named)
    dispatch.require_same_device("bn_match", x=x, **named)
