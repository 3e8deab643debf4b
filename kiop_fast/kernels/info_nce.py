"""info_nce: contrastive loss over detached keys, loss and query gradient in one pass.

With n valid keys, query i's positive being key i:

    loss = Σ_{i<n} w_i (logsumexp_{j<n}(q_i·k_j / τ) - q_i·k_i / τ)
    d q_i = grad · w_i/τ · (O_i - k_i),   O = softmax(q kᵀ / τ) k

Keys carry no gradient (upstream detaches them), so the gradient is attention with V = K: one pass
gives the loss and O, nothing is recomputed and the (M, K) logits never exist.

    queries (M, D)   keys (K, D), M <= K   weights (M,)   num_keys () or (1,) integer   loss ()

Bytes moved, b an element: forward reads (M + K)·D·b (keys again for every block of queries, from
L2) and writes O - k, M·D·b; where the keys are split into S shares, S·M·(D + 3) fp32 come and go
once more.  Backward reads O - k and writes the gradient, already times the loss's own cotangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch
from kiop_fast.kernels.info_nce_triton import MAX_WIDTH, launch_bwd, launch_fwd

# Logits that exist at a time in the eager twin, 4 MB.  Measured on one core (2.8 GHz Xeon), fp32,
# 4160 × 4160 × 256, forward + backward: 2^18 249 ms, 2^20 224 ms, unchunked 267 ms; autograd of the
# plain formula 465 ms.
CHUNK = 1 << 20


def info_nce_eager(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    weights: Tensor,
    *,
    num_keys: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, CHUNK logits at a time; the gradient is made on the way."""
    return _Twin.apply(queries, keys.detach(), weights, num_keys, temperature, _needs(queries))


def _loss_and_direction(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    num_keys: Tensor | None,
    temperature: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, O - k_i): softmax without normalising the (rows, K) tile, as the kernel does it."""
    dtype = dispatch.accumulation_dtype(queries)
    valid = None
    if num_keys is not None:
        valid = torch.arange(len(keys), device=keys.device) < num_keys
        keys = torch.where(valid[:, None], keys, 0)
    losses, directions = [], []
    rows = max(1, CHUNK // len(keys))
    for start, chunk in zip(range(0, len(queries), rows), queries.split(rows), strict=True):
        logits = (chunk @ keys.T).to(dtype).div_(temperature)
        if valid is not None:
            logits.masked_fill_(~valid, -torch.inf)
        positive = logits.diagonal(start).clone()
        top = logits.amax(1)
        e = logits.sub_(top[:, None]).exp_()
        total = e.sum(1)
        losses.append(total.log() + (top - positive))
        if need_direction:
            mixed = (e.to(keys.dtype) @ keys).to(dtype).div_(total[:, None])
            directions.append(mixed.sub_(keys[start : start + len(chunk)]))
    loss = torch.cat(losses) * weights
    direction = torch.cat(directions) if need_direction else queries.new_empty(0)
    if valid is not None:
        loss = torch.where(valid[: len(loss)], loss, 0)
        if need_direction:
            direction = torch.where(valid[: len(loss), None], direction, 0)
    return loss.sum(), direction.to(queries.dtype)


def _grad_queries(
    grad: Tensor,
    direction: Tensor,
    weights: Tensor,
    num_keys: Tensor | None,
    temperature: float,
) -> Tensor:
    slope = weights.to(grad.dtype) * (grad / temperature)
    if num_keys is not None:
        slope = torch.where(torch.arange(len(slope), device=slope.device) < num_keys, slope, 0)
    return (direction * slope[:, None]).to(direction.dtype)


def _needs(queries: Tensor) -> bool:
    return queries.requires_grad and torch.is_grad_enabled()


class _Twin(torch.autograd.Function):
    """The eager twin's gradient; torch.compile traces through it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, direction = _loss_and_direction(*inputs)
        _setup_context(ctx, inputs, (loss, direction))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        direction, weights, num_keys = ctx.saved_tensors
        grad_queries = _grad_queries(grad, direction, weights, num_keys, ctx.temperature)
        return grad_queries, None, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, keys, weights, num_keys, ctx.temperature, _ = inputs
    ctx.n_keys = len(keys)
    ctx.save_for_backward(output[1], weights, num_keys)


def _use_triton(queries: Tensor, keys: Tensor, weights: Tensor) -> bool:
    width = queries.shape[1]
    unsupported = f"width {width}; at most {MAX_WIDTH}" if width > MAX_WIDTH else ""
    return dispatch.use_triton("info_nce", queries, keys, weights, unsupported=unsupported)


@torch.library.custom_op("kiop_fast::info_nce", mutates_args=())
def _info_nce(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    num_keys: Tensor | None,
    temperature: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor]:
    run = launch_fwd if _use_triton(queries, keys, weights) else _loss_and_direction
    return run(queries, keys, weights, num_keys, temperature, need_direction)


@_info_nce.register_fake
def _(queries, keys, weights, num_keys, temperature, need_direction):  # type: ignore[no-untyped-def]
    loss = queries.new_empty((), dtype=dispatch.accumulation_dtype(queries))
    return loss, queries.new_empty(queries.shape if need_direction else (0,))


@torch.library.custom_op("kiop_fast::info_nce_backward", mutates_args=())
def _info_nce_backward(
    grad: Tensor,
    direction: Tensor,
    weights: Tensor,
    num_keys: Tensor | None,
    n_keys: int,
    temperature: float,
) -> Tensor:
    if _use_triton(direction, direction, weights):
        return launch_bwd(grad, direction, weights, num_keys, n_keys, temperature)
    return _grad_queries(grad, direction, weights, num_keys, temperature)


@_info_nce_backward.register_fake
def _(grad, direction, weights, num_keys, n_keys, temperature):  # type: ignore[no-untyped-def]
    return torch.empty_like(direction)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    # The second cotangent is that of the direction, which nobody outside sees.
    grad_queries = _info_nce_backward(grad, *ctx.saved_tensors, ctx.n_keys, ctx.temperature)
    return grad_queries, None, None, None, None, None


_info_nce.register_autograd(_backward, setup_context=_setup_context)


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

    Under autocast its products take factors of autocast's dtype, as any matrix product does.

    Returns:
        0-d loss, fp32 (fp64 for fp64 queries).

    Raises:
        KernelError: shapes, dtypes, devices or temperature that do not fit.
    """
    _check(queries, keys, temperature, weights, num_keys)
    if not _use_triton(queries, keys, weights):
        return info_nce_eager(queries, keys, temperature, weights, num_keys=num_keys)
    need_direction, device = _needs(queries), queries.device.type
    if torch.is_autocast_enabled(device):  # as it casts a matrix product's factors
        dtype = torch.get_autocast_dtype(device)
        queries, keys = queries.to(dtype), keys.to(dtype)
    return _info_nce(queries, keys.detach(), weights, num_keys, temperature, need_direction)[0]


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
