"""info_nce: contrastive loss over detached keys, loss and query gradient in one pass.

With n valid keys, query i's positive being key i:

    loss = Σ_{i<n} w_i (logsumexp_{j<n}(q_i·k_j / τ) - q_i·k_i / τ)
    d q_i = grad · w_i/τ · (O_i - k_i),   O = softmax(q kᵀ / τ) k

Keys carry no gradient (upstream detaches them), so the gradient is attention with V = K: one pass
gives the loss and O, nothing is recomputed and the (M, K) logits never exist.

    queries (M, D)   keys (K, D), M <= K   weights (M,)   num_keys () or (1,) integer   loss ()
"""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch


def info_nce_eager(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    weights: Tensor,
    *,
    num_keys: Tensor | None = None,
) -> Tensor:
    """The same in plain torch."""
    dtype = dispatch.accumulation_dtype(queries)
    keys = keys.detach()
    valid = None
    if num_keys is not None:
        valid = torch.arange(len(keys), device=keys.device) < num_keys
        keys = torch.where(valid[:, None], keys, 0)
    logits = (queries @ keys.T).to(dtype) / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    losses = (logits.logsumexp(1) - logits.diagonal()) * weights
    if valid is not None:
        losses = torch.where(valid[: len(losses)], losses, 0)
    return losses.sum()


def info_nce(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    weights: Tensor,
    *,
    num_keys: Tensor | None = None,
) -> Tensor:
    """Weighted sum of InfoNCE terms; gradient to the queries only.

    Args:
        queries: (M, D).
        keys: (K, D), K >= M; the positive of query i is key i.  Taken as constants.
        temperature: τ > 0 (SPEC section 4: 0.6).
        weights: (M,), constants; 1/M gives the mean.
        num_keys: 0-d or 1-element integer tensor on the same device; keys and queries from
            that row on are ignored, whatever they hold.  None: all keys.  It is read on the
            device, so a captured graph follows a growing bank.

    Returns:
        0-d loss, fp32 (fp64 for fp64 queries).

    Raises:
        KernelError: shapes, dtypes, devices or temperature that do not fit.
    """
    _check(queries, keys, temperature, weights, num_keys)
    return info_nce_eager(queries, keys, temperature, weights, num_keys=num_keys)


def _check(
    queries: Tensor, keys: Tensor, temperature: float, weights: Tensor, num_keys: Tensor | None
) -> None:
    shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}"
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise KernelError(
            "info_nce takes two sets of embeddings of one width",
            got=shapes,
            expected="(M, D) and (K, D)",
        )
    if not 0 < len(queries) <= len(keys) or queries.shape[1] == 0:
        raise KernelError(
            "info_nce: every query needs its own key",
            got=shapes,
            expected="1 <= M <= K, D >= 1; query i's positive is key i",
        )
    if tuple(weights.shape) != (len(queries),) or weights.requires_grad:
        raise KernelError(
            "info_nce: weights are one constant a query",
            got=f"weights {tuple(weights.shape)}, requires_grad={weights.requires_grad}",
            expected=f"({len(queries)},) without gradient",
        )
    if not 0 < temperature < float("inf"):
        raise KernelError("info_nce: bad temperature", got=temperature, expected="finite, > 0")
    dispatch.require_floating("info_nce", queries=queries, keys=keys, weights=weights)
    dispatch.require_same_device(
        "info_nce", queries=queries, keys=keys, weights=weights, num_keys=num_keys
    )
    if queries.dtype != keys.dtype:
        raise KernelError(
            "info_nce: queries and keys must share a dtype",
            got=f"queries {queries.dtype}, keys {keys.dtype}",
        )
    if num_keys is not None and (
        num_keys.numel() != 1 or num_keys.dtype not in (torch.int32, torch.int64)
    ):
        raise KernelError(
            "info_nce: num_keys is one integer on the device",
            got=f"{tuple(num_keys.shape)} {num_keys.dtype}",
            expected="0-d or 1-element int32 or int64 tensor",
        )
