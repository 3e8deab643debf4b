"""mapped_kl: distillation through a label mapping, both sides differentiable, in one pass.

    loss = T²/N · Σ_i w_i KL(p_i ‖ q_i),   p = softmax(target_logits / T),
                                           q = softmax(logits[:, mapping] / T)
    d logits[i, c]        = grad · T/N · w_i Σ_{j: mapping[j] = c} (q_ij - p_ij)
    d target_logits[i, j] = grad · T/N · w_i p_ij ((log p - log q)_ij - KL_i)

w_i = 1, or with ``only_agreeing`` 1[argmax target_i = argmax mapped logits_i], which makes it
-L_adv of contrastive model inversion (SPEC section 4).  p_ij = 0 contributes 0 whatever q_ij is.

    logits (N, Ka)   target_logits (N, Kb)   mapping (Kb,) int64   loss ()   agreement () int64
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch


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
        rows = torch.where(agrees, rows, 0)
    return MappedKL(rows.sum() * (temperature**2 / len(rows)), agrees.sum())


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
    return mapped_kl_eager(logits, target_logits, mapping, temperature, only_agreeing=only_agreeing)


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
    if mapping.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = mapping.aminmax()
        if low < 0 or high >= logits.shape[1]:
            raise KernelError(
                "mapped_kl: mapping index out of range",
                got=f"{int(low)} … {int(high)}",
                expected=f"0 … {logits.shape[1] - 1}, classes of logits {tuple(logits.shape)}",
            )
