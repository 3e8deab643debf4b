"""mapped_kl: distillation through a label mapping, both sides differentiable, in one pass.

    loss = T²/N · Σ_i w_i KL(p_i ‖ q_i),   p = softmax(target_logits / T),
                                           q = softmax(logits[:, mapping] / T)
    d logits[i, c]        = grad · T/N · w_i Σ_{j: mapping[j] = c} (q_ij - p_ij)
    d target_logits[i, j] = grad · T/N · w_i p_ij ((log p - log q)_ij - KL_i)

w_i = 1, or with ``only_agreeing`` 1[argmax target_i = argmax mapped logits_i], which makes it
-L_adv of contrastive model inversion (SPEC section 4).  p_ij = 0 contributes 0 whatever q_ij is.

    logits (N, Ka)   target_logits (N, Kb)   mapping (Kb,) int64   loss ()   agreement () int64

Bytes moved, b an element: forward N·(Ka + Kb)·b read, six fp32 a row written; backward reads both
again and writes each gradient that is asked for, already times the loss's own cotangent (a loss
scale therefore arrives before the rounding to half precision).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch
from kiop_fast.kernels.mapped_kl_triton import MAX_CLASSES, launch_bwd, launch_fwd


class MappedKL(NamedTuple):
    """loss: 0-d, fp32 (fp64 for fp64 logits).  agreement: 0-d int64, rows with equal arg-max."""

    loss: Tensor
    agreement: Tensor


def mapped_kl_eager(
    logits: Tensor,
    target_logits: Tensor,
    mapping: Tensor | None = None,
    temperature: float = 1.0,
    *,
    only_agreeing: bool = False,
) -> MappedKL:
    """The same in plain torch."""
    dtype = dispatch.accumulation_dtype(logits, target_logits)
    mapped = logits if mapping is None else logits.index_select(1, mapping)
    agrees = mapped.argmax(1) == target_logits.argmax(1)
    log_q = torch.log_softmax(mapped.to(dtype) / temperature, dim=1)
    log_p = torch.log_softmax(target_logits.to(dtype) / temperature, dim=1)
    p = log_p.exp()
    # Selecting before multiplying keeps 0 · (-inf) out of the value and of both gradients.
    rows = (p * torch.where(p > 0, log_p - log_q, 0)).sum(1)
    if only_agreeing:
        rows = torch.where(agrees | rows.isnan(), rows, 0)
    return MappedKL(rows.sum() * (temperature**2 / len(rows)), agrees.sum())


def _use_triton(logits: Tensor, target: Tensor) -> bool:
    classes = max(logits.shape[1], target.shape[1])
    unsupported = f"{classes} classes; at most {MAX_CLASSES}" if classes > MAX_CLASSES else ""
    return dispatch.use_triton("mapped_kl", logits, target, unsupported=unsupported)


def _centre(x: Tensor, dtype: torch.dtype, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """z = (x - max) / T, the maximum, and Σ exp(z), a row."""
    x = x.to(dtype)
    top = x.amax(1)
    z = (x - top[:, None]) / temperature
    return z, top, z.exp().sum(1)


@torch.library.custom_op("kiop_fast::mapped_kl", mutates_args=())
def _mapped_kl(
    logits: Tensor,
    target: Tensor,
    mapping: Tensor | None,
    temperature: float,
    only_agreeing: bool,
    invert: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _use_triton(logits, target):
        return launch_fwd(logits, target, mapping, temperature, only_agreeing, invert)
    dtype = dispatch.accumulation_dtype(logits, target)
    mapped = logits if mapping is None else logits.index_select(1, mapping)
    agrees = mapped.argmax(1) == target.argmax(1)
    z_q, top_q, sum_q = _centre(mapped, dtype, temperature)
    z_p, top_p, sum_p = _centre(target, dtype, temperature)
    e_p = z_p.exp()
    mean = torch.where(e_p == 0, 0, e_p * (z_p - z_q)).sum(1) / sum_p
    kl = mean + (sum_q / sum_p).log()
    weight = agrees | kl.isnan() if only_agreeing else torch.ones_like(agrees)
    loss = torch.where(weight, kl, 0).sum() * (temperature**2 / len(kl))
    rows = torch.stack([top_q, 1 / sum_q, top_p, 1 / sum_p, mean, weight.to(dtype)])
    return loss, agrees.sum(), rows, _empty_inverse(logits, invert)


def _empty_inverse(logits: Tensor, invert: bool) -> Tensor:
    return logits.new_zeros(logits.shape[1] if invert else 0, dtype=torch.int64)


@_mapped_kl.register_fake
def _(logits, target, mapping, temperature, only_agreeing, invert):  # type: ignore[no-untyped-def]
    loss = logits.new_empty((), dtype=dispatch.accumulation_dtype(logits, target))
    agreement = logits.new_empty((), dtype=torch.int64)
    return loss, agreement, loss.new_empty(6, logits.shape[0]), _empty_inverse(logits, invert)


@torch.library.custom_op("kiop_fast::mapped_kl_backward", mutates_args=())
def _mapped_kl_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    mapping: Tensor | None,
    rows: Tensor,
    inverse: Tensor,
    temperature: float,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    if _use_triton(logits, target):
        return launch_bwd(
            grad, logits, target, mapping, rows, inverse, temperature,
            need_logits, need_target,
        )  # fmt: skip
    top_q, norm_q, top_p, norm_p, mean, weight = (row[:, None] for row in rows)
    mapped = logits if mapping is None else logits.index_select(1, mapping)
    z_q = (mapped.to(rows.dtype) - top_q) / temperature
    z_p = (target.to(rows.dtype) - top_p) / temperature
    p, factor = z_p.exp() * norm_p, grad * (temperature / len(logits))
    grad_logits, grad_target = logits.new_empty(0), target.new_empty(0)
    if need_logits:
        g = torch.where(weight > 0, (z_q.exp() * norm_q - p) * factor, 0)
        if mapping is not None:
            g = g.new_zeros(logits.shape).index_add_(1, mapping, g)
        grad_logits = g.to(logits.dtype)
    if need_target:
        g = p * (z_p - z_q - mean) * factor
        grad_target = torch.where((weight > 0) & (p != 0), g, 0).to(target.dtype)
    return grad_logits, grad_target


@_mapped_kl_backward.register_fake
def _(grad, logits, target, m, r, i, t, need_logits, need_target):  # type: ignore[no-untyped-def]
    return (
        logits.new_empty(logits.shape if need_logits else (0,)),
        target.new_empty(target.shape if need_target else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, mapping, temperature, _, _ = inputs
    ctx.save_for_backward(logits, target, mapping, *output[2:])
    ctx.temperature = temperature
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    need_logits, need_target = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 6
    grad_logits, grad_target = _mapped_kl_backward(
        grad, *ctx.saved_tensors, ctx.temperature, need_logits, need_target
    )
    sides = grad_logits if need_logits else None, grad_target if need_target else None
    return *sides, None, None, None, None


_mapped_kl.register_autograd(_backward, setup_context=_setup_context)


def mapped_kl(
    logits: Tensor,
    target_logits: Tensor,
    mapping: Tensor | None = None,
    temperature: float = 1.0,
    *,
    only_agreeing: bool = False,
) -> MappedKL:
    """Batch-mean KL × T² from target to mapped logits, and how many rows agree.

    Args:
        logits: (N, Ka), the model that learns to match (paper: A through the prompt).
        target_logits: (N, Kb), the distribution to match.
        mapping: (Kb,) int64, class of ``logits`` that stands for target class j; repeats are
            allowed.  None: the identity, Ka = Kb.
        temperature: T > 0.
        only_agreeing: count only rows whose arg-max agree (the mean is still over all N).

    Raises:
        KernelError: shapes, dtypes, devices or temperature that do not fit; a mapping index
            out of range (CPU tensors; on CUDA, where looking would wait for the device, such
            an index is never read through and makes the loss NaN).
    """
    _check(logits, target_logits, mapping, temperature)
    if not _use_triton(logits, target_logits):
        return mapped_kl_eager(
            logits, target_logits, mapping, temperature, only_agreeing=only_agreeing
        )
    invert = mapping is not None and logits.requires_grad and torch.is_grad_enabled()
    loss, agreement, *_ = _mapped_kl(
        logits, target_logits, mapping, temperature, only_agreeing, invert
    )
    return MappedKL(loss, agreement)


def _check(
    logits: Tensor, target_logits: Tensor, mapping: Tensor | None, temperature: float
) -> None:
    classes = target_logits.shape[-1]
    if logits.ndim != 2 or target_logits.ndim != 2 or len(logits) != len(target_logits):
        raise KernelError(
            "mapped_kl takes two batches of logits over the same rows",
            got=f"logits {tuple(logits.shape)}, target_logits {tuple(target_logits.shape)}",
            expected="(N, Ka) and (N, Kb)",
        )
    if 0 in logits.shape or 0 in target_logits.shape:
        raise KernelError(
            "mapped_kl needs at least one row and one class",
            got=f"logits {tuple(logits.shape)}, target_logits {tuple(target_logits.shape)}",
        )
    dispatch.require_floating("mapped_kl", logits=logits, target_logits=target_logits)
    dispatch.require_same_device(
        "mapped_kl", logits=logits, target_logits=target_logits, mapping=mapping
    )
    if not 0 < temperature < float("inf"):
        raise KernelError("mapped_kl: bad temperature", got=temperature, expected="finite, > 0")
    if mapping is None:
        if logits.shape != target_logits.shape:
            raise KernelError(
                "mapped_kl without a mapping needs equal classes",
                got=f"logits {tuple(logits.shape)}, target_logits {tuple(target_logits.shape)}",
                fix="pass mapping, the class of logits for each target class",
            )
        return
    if mapping.dtype != torch.int64 or tuple(mapping.shape) != (classes,):
        raise KernelError(
            "mapped_kl: bad mapping",
            got=f"{tuple(mapping.shape)} {mapping.dtype}",
            expected=f"({classes},) torch.int64, one class of logits a target class",
        )
    if dispatch.on_host(mapping):
        low, high = mapping.aminmax()
        if low < 0 or high >= logits.shape[1]:
            raise KernelError(
                "mapped_kl: mapping index out of range",
                got=f"{int(low)} … {int(high)}",
                expected=f"0 … {logits.shape[1] - 1}, classes of logits {tuple(logits.shape)}",
            )
