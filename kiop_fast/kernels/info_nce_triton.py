"""The Triton kernels of info_nce; the math is in ``info_nce.py``.

Keys are constants, so this is attention with V = K.  A program holds BLOCK_M queries and walks
through one share of the keys with a running maximum, keeping Σ e, Σ e·k and the positive logit,
in base 2.  With one share it finishes its rows itself; with several a second kernel merges them.
No atomics; the number of valid keys is read on the device, where it also sets the shares.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.dispatch import tl, triton

MAX_WIDTH = 512
# Not measured on a GPU yet.  Shares are for filling PROGRAMS multiprocessors (an H200's).
PROGRAMS, MAX_SHARES = 132, 16
MERGE_ROWS, ROW_TILE, ROW_WARPS = 8, 4096, 8


@dispatch.jit
def _valid_keys(num_keys_ptr, n_keys, HAS_NUM_KEYS: tl.constexpr):
    valid = n_keys
    if HAS_NUM_KEYS:
        valid = tl.minimum(tl.load(num_keys_ptr).to(tl.int32), n_keys)
    return valid


@dispatch.jit
def _finish(
    top, total, positive, mixed, pid, row, m_row, n_queries, o_d, m_d,
    keys_ptr, weights_ptr, loss_ptr, direction_ptr, stride_k, D: tl.constexpr,
    NEED_DIRECTION: tl.constexpr,
):  # fmt: skip
    """Loss and O - k_i of these rows, from the maximum, Σ e, the positive logit and Σ e·k.

    m_row: the rows that count; the others' loss and direction are 0.
    """
    weight = tl.load(weights_ptr + row, mask=m_row, other=0.0).to(tl.float32)
    top = tl.where(m_row, top, 0.0)
    total = tl.where(m_row, total, 1.0)
    losses = tl.where(m_row, weight * ((top - positive) + tl.log2(total)), 0.0)
    ln_2 = 0.6931471805599453
    tl.store(loss_ptr + pid, tl.sum(losses, axis=0) * ln_2)
    if NEED_DIRECTION:
        m_tile = m_row[:, None] & m_d[None, :]
        k = tl.load(keys_ptr + row[:, None] * stride_k + o_d[None, :], mask=m_tile, other=0.0)
        direction = tl.where(m_row[:, None], mixed / total[:, None] - k.to(tl.float32), 0.0)
        at = direction_ptr + row[:, None] * D + o_d[None, :]
        m_out = (row < n_queries)[:, None] & m_d[None, :]
        tl.store(at, direction.to(direction_ptr.dtype.element_ty), mask=m_out)


@dispatch.jit
def _info_nce_fwd_kernel(
    queries_ptr,  # (M, D), rows contiguous
    keys_ptr,  # (K, D), rows contiguous
    weights_ptr,  # (M,)
    num_keys_ptr,  # () where HAS_NUM_KEYS
    loss_ptr,  # (row blocks,) fp32 where ONE_SHARE
    direction_ptr,  # (M, D) where ONE_SHARE and NEED_DIRECTION
    rows_ptr,  # (shares, 3, M) fp32 unless ONE_SHARE: maximum, Σ e, positive logit
    mixed_ptr,  # (shares, M, D) fp32 unless ONE_SHARE, where NEED_DIRECTION
    n_queries,
    n_keys,
    shares,
    stride_q,
    stride_k,
    scale,
    D: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    NEED_DIRECTION: tl.constexpr,
    ONE_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    valid = _valid_keys(num_keys_ptr, n_keys, HAS_NUM_KEYS)
    pid = tl.program_id(0)
    share = tl.program_id(1)
    o_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    row = o_m.to(tl.int64)
    m_row = o_m < tl.minimum(n_queries, valid)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    at_q = queries_ptr + row[:, None] * stride_q + o_d[None, :]
    q = tl.load(at_q, mask=m_row[:, None] & m_d[None, :], other=0.0)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    keys_a_share = tl.cdiv(tl.cdiv(valid, BLOCK_N), shares) * BLOCK_N
    begin = share * keys_a_share
    end = tl.minimum(begin + keys_a_share, valid)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        at_k = keys_ptr + o_n.to(tl.int64)[:, None] * stride_k + o_d[None, :]
        k = tl.load(at_k, mask=m_n[:, None] & m_d[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        positive += tl.sum(tl.where(o_m[:, None] == o_n[None, :], s, 0.0), axis=1)
        s = tl.where(m_n[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.exp2(top - new_top)
        e = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(e, axis=1)
        if NEED_DIRECTION:
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(e.to(k.dtype), k, mixed, input_precision=PRECISION)
        top = new_top
    if ONE_SHARE:
        _finish(
            top, total, positive, mixed, pid, row, m_row, n_queries, o_d, m_d,
            keys_ptr, weights_ptr, loss_ptr, direction_ptr, stride_k, D, NEED_DIRECTION,
        )  # fmt: skip
    else:
        at = rows_ptr + share * 3 * n_queries + row
        tl.store(at, top, mask=m_row)
        tl.store(at + n_queries, total, mask=m_row)
        tl.store(at + 2 * n_queries, positive, mask=m_row)
        if NEED_DIRECTION:
            at_mixed = mixed_ptr + (share.to(tl.int64) * n_queries + row)[:, None] * D
            tl.store(at_mixed + o_d[None, :], mixed, mask=m_row[:, None] & m_d[None, :])


@dispatch.jit
def _info_nce_merge_kernel(
    keys_ptr,  # (K, D), rows contiguous
    weights_ptr,  # (M,)
    num_keys_ptr,  # () where HAS_NUM_KEYS
    rows_ptr,  # (shares, 3, M)
    mixed_ptr,  # (shares, M, D) where NEED_DIRECTION
    loss_ptr,  # (row blocks,)
    direction_ptr,  # (M, D) where NEED_DIRECTION
    n_queries,
    n_keys,
    shares,
    stride_k,
    D: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    NEED_DIRECTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    valid = _valid_keys(num_keys_ptr, n_keys, HAS_NUM_KEYS)
    pid = tl.program_id(0)
    o_m = pid * ROWS + tl.arange(0, ROWS)
    row = o_m.to(tl.int64)
    m_row = o_m < tl.minimum(n_queries, valid)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    for share in range(shares):
        at = rows_ptr + share * 3 * n_queries + row
        top = tl.maximum(top, tl.load(at, mask=m_row, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    positive = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
    at_mixed = mixed_ptr + row[:, None] * D + o_d[None, :]
    for share in range(shares):
        at = rows_ptr + share * 3 * n_queries + row
        # A share without keys has maximum -inf and weighs nothing.
        grow = tl.exp2(tl.load(at, mask=m_row, other=0.0) - top)
        total += tl.load(at + n_queries, mask=m_row, other=0.0) * grow
        positive += tl.load(at + 2 * n_queries, mask=m_row, other=0.0)
        if NEED_DIRECTION:
            part = tl.load(at_mixed, mask=m_row[:, None] & m_d[None, :], other=0.0)
            mixed += part * grow[:, None]
            at_mixed += n_queries * D
    _finish(
        top, total, positive, mixed, pid, row, m_row, n_queries, o_d, m_d,
        keys_ptr, weights_ptr, loss_ptr, direction_ptr, stride_k, D, NEED_DIRECTION,
    )  # fmt: skip


@dispatch.jit
def _info_nce_bwd_kernel(
    grad_ptr,  # () cotangent of the loss
    direction_ptr,  # (M, D)
    weights_ptr,  # (M,)
    num_keys_ptr,  # () where HAS_NUM_KEYS
    grad_queries_ptr,  # (M, D)
    n_queries,
    n_keys,
    inverse_temperature,
    D: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counted = o_m < tl.minimum(n_queries, _valid_keys(num_keys_ptr, n_keys, HAS_NUM_KEYS))
    weight = tl.load(weights_ptr + o_m, mask=counted, other=0.0).to(tl.float32)
    slope = tl.load(grad_ptr).to(tl.float32) * inverse_temperature * weight
    o_d = tl.arange(0, BLOCK_D)
    at = o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    m_tile = (o_m < n_queries)[:, None] & (o_d < D)[None, :]
    direction = tl.load(direction_ptr + at, mask=m_tile & counted[:, None], other=0.0)
    grad = direction.to(tl.float32) * slope[:, None]
    tl.store(grad_queries_ptr + at, grad.to(grad_queries_ptr.dtype.element_ty), mask=m_tile)


def launch_fwd(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    num_keys: Tensor | None,
    temperature: float,
    need_direction: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, direction O - k_i like queries); the latter is empty unless asked for."""
    (n_queries, width), n_keys = queries.shape, len(keys)
    queries, keys, weights = _rows(queries), _rows(keys), weights.contiguous()
    tile = _tile(queries.dtype, width)
    blocks = triton.cdiv(n_queries, tile["BLOCK_M"])
    shares = max(1, min(PROGRAMS // blocks, MAX_SHARES, triton.cdiv(n_keys, tile["BLOCK_N"])))
    merges = triton.cdiv(n_queries, MERGE_ROWS)
    common = {"D": width, "HAS_NUM_KEYS": num_keys is not None, "NEED_DIRECTION": need_direction}
    empty = queries.new_empty
    loss = empty(blocks if shares == 1 else merges, dtype=torch.float32)
    direction = empty((n_queries, width) if need_direction else (0,))
    partial = (shares,) if shares > 1 else (0,)
    rows = empty(*partial, 3, n_queries, dtype=torch.float32)
    mixed = empty(*partial, n_queries, width if need_direction else 0, dtype=torch.float32)
    dispatch.launch(
        _info_nce_fwd_kernel, (blocks, shares),
        queries, keys, weights, num_keys, loss, direction, rows, mixed,
        n_queries, n_keys, shares, queries.stride(0), keys.stride(0),
        math.log2(math.e) / temperature,
        ONE_SHARE=shares == 1, **common, **tile,
    )  # fmt: skip
    if shares > 1:
        dispatch.launch(
            _info_nce_merge_kernel, (merges,),
            keys, weights, num_keys, rows, mixed, loss, direction,
            n_queries, n_keys, shares, keys.stride(0),
            **common, ROWS=MERGE_ROWS, BLOCK_D=tile["BLOCK_D"],
            num_warps=ROW_WARPS,
        )  # fmt: skip
    return loss.sum() if len(loss) > 1 else loss.view(()), direction


def launch_bwd(
    grad: Tensor, direction: Tensor, weights: Tensor, num_keys: Tensor | None, n_keys: int,
    temperature: float,
) -> Tensor:  # fmt: skip
    """grad · w_i/τ · direction, scaled before it is rounded."""
    n_queries, width = direction.shape
    grad_queries = torch.empty_like(direction)
    block_d = triton.next_power_of_2(width)
    rows = max(1, ROW_TILE // block_d)
    dispatch.launch(
        _info_nce_bwd_kernel, (triton.cdiv(n_queries, rows),),
        grad, direction, weights.contiguous(), num_keys, grad_queries,
        n_queries, n_keys, 1 / temperature,
        D=width, HAS_NUM_KEYS=num_keys is not None, ROWS=rows, BLOCK_D=block_d,
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return grad_queries


def _rows(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()


def _tile(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Largest tiles that neither spill registers (ptxas) nor leave an A100's shared memory.

    fp32 follows torch's own switch: TF32 where ``torch.set_float32_matmul_precision`` allows it,
    else exact products on the CUDA cores.  The latter's small tiles make it the first candidate to
    lose to the twin's cuBLAS products: measure it before relying on it.
    """
    block_d = max(16, triton.next_power_of_2(width))
    narrow, precision = block_d <= 256, "ieee"
    if dtype != torch.float32:
        m, n, warps, stages = (64, 64, 8, 3) if narrow else (32, 32, 8, 2)
    elif torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
        m, n, warps, stages = (32, 32, 8, 2) if narrow else (16, 32, 8, 1)
    else:
        m, n, warps, stages = (32, 16, 16, 2) if narrow else (16, 16, 16, 1)
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d}
    return blocks | {"PRECISION": precision, "num_warps": warps, "num_stages": stages}
