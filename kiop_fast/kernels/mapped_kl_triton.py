"""The Triton kernels of mapped_kl; the math is in ``mapped_kl.py``.

Forward: a program reads ROWS rows of both logits once and keeps them in registers for both
log-softmaxes (beyond MAX_BLOCK classes it reads them twice, in chunks); it writes six numbers a
row and one partial loss.  With more than one program a second kernel adds the partial losses in a
fixed order.  The same launch inverts the mapping for the backward, in programs after the rows'.
Backward: one kernel, element by element, for either side or both.  The gradient of ``logits`` is
gathered through the inverted mapping, class by class: no floating-point atomics, contiguous
stores.  Classes that the mapping repeats are summed in order, in a loop over all Kb.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.dispatch import tl, triton

MAX_CLASSES, MAX_BLOCK = 16384, 8192
# Not measured on a GPU yet.  Up to ONE_PROGRAM elements, one program does all rows and no second
# launch is needed; beyond, smaller tiles spread the rows over the multiprocessors.  A thread holds
# at most 16 elements of each tile: with more, the forward spills registers (ptxas).
ONE_PROGRAM, TILE = 4096, 2048
INVERT_BLOCK = SUM_BLOCK = 1024


@dispatch.jit
def _load_both(
    logits_row, target_row, mapping_ptr, o_b, ka, kb, stride_l, stride_t, HAS_MAPPING: tl.constexpr
):
    """(target, mapped logits) at rows × classes o_b in fp32, -inf from class kb on.

    A mapping index out of range is never read through: it gives NaN.
    """
    m_b = o_b < kb
    at = target_row + (o_b.to(tl.int64) * stride_t)[None, :]
    t = tl.load(at, mask=m_b[None, :], other=-float("inf")).to(tl.float32)
    o_a = tl.load(mapping_ptr + o_b, mask=m_b, other=0) if HAS_MAPPING else o_b
    m_a = (o_a >= 0) & (o_a < ka)
    at = logits_row + (o_a.to(tl.int64) * stride_l)[None, :]
    s = tl.load(at, mask=(m_b & m_a)[None, :], other=-float("inf")).to(tl.float32)
    return t, tl.where((m_b & ~m_a)[None, :], float("nan"), s)


@dispatch.jit
def _terms(t, s, top_p, top_q, inverse_temperature):
    """A row's Σ e_p, Σ e_q and Σ e_p (z_p - z_q), where z = (x - top) / T and e = exp(z)."""
    # Subtracting before scaling rounds small differences, not large logits.
    z_p = (t - top_p[:, None]) * inverse_temperature
    z_q = (s - top_q[:, None]) * inverse_temperature
    e_p = tl.exp(z_p)
    cross = tl.sum(tl.where(e_p == 0, 0.0, e_p * (z_p - z_q)), axis=1)
    return tl.sum(e_p, axis=1), tl.sum(tl.exp(z_q), axis=1), cross


@dispatch.jit
def _invert(block, mapping_ptr, inverse_ptr, ka, kb, BLOCK: tl.constexpr):
    """Adds 2³² + j to inverse[mapping[j]]: its high half counts repeats, its low half names j.

    The low half is j only where the high half is 1.  Integer addition has no order.
    """
    j = block * BLOCK + tl.arange(0, BLOCK)
    o_a = tl.load(mapping_ptr + j, mask=j < kb, other=-1)
    entry = j.to(tl.int64) + 4294967296
    tl.atomic_add(inverse_ptr + o_a, entry, mask=(o_a >= 0) & (o_a < ka), sem="relaxed")


@dispatch.jit
def _mapped_kl_fwd_kernel(
    logits_ptr,  # (N, Ka), any strides
    target_ptr,  # (N, Kb), any strides
    mapping_ptr,  # (Kb,) int64 where HAS_MAPPING
    loss_ptr,  # (row_programs,) fp32
    agreement_ptr,  # (row_programs,) int64
    rows_ptr,  # (6, N) fp32: top and 1/Σe of q, of p, mean of z_p - z_q under p, weight
    inverse_ptr,  # (Ka,) int64 where INVERT, zeros before
    n_rows, ka, kb, row_programs,
    stride_logits_row, stride_l, stride_target_row, stride_t,
    inverse_temperature, scale,
    HAS_MAPPING: tl.constexpr, INVERT: tl.constexpr, ONLY_AGREEING: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_B: tl.constexpr, CHUNKED: tl.constexpr, INVERT_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < row_programs:
        o_row = pid * ROWS + tl.arange(0, ROWS)
        m_row = o_row < n_rows
        # Rows past the end repeat the last one, so that no lane computes with rubbish.
        row = tl.minimum(o_row, n_rows - 1).to(tl.int64)
        logits_row = logits_ptr + row[:, None] * stride_logits_row
        target_row = target_ptr + row[:, None] * stride_target_row
        o_b = tl.arange(0, BLOCK_B)
        t, s = _load_both(
            logits_row, target_row, mapping_ptr, o_b, ka, kb, stride_l, stride_t, HAS_MAPPING
        )
        top_p, first_p = tl.max(t, axis=1), tl.argmax(t, axis=1)
        top_q, first_q = tl.max(s, axis=1), tl.argmax(s, axis=1)
        if CHUNKED:
            for start in range(BLOCK_B, kb, BLOCK_B):
                o = start + o_b
                t, s = _load_both(
                    logits_row, target_row, mapping_ptr, o, ka, kb, stride_l, stride_t, HAS_MAPPING
                )
                first_p = tl.where(tl.max(t, axis=1) > top_p, start + tl.argmax(t, axis=1), first_p)
                first_q = tl.where(tl.max(s, axis=1) > top_q, start + tl.argmax(s, axis=1), first_q)
                top_p = tl.maximum(top_p, tl.max(t, axis=1))
                top_q = tl.maximum(top_q, tl.max(s, axis=1))
            sum_p = tl.zeros((ROWS,), tl.float32)
            sum_q = tl.zeros((ROWS,), tl.float32)
            cross = tl.zeros((ROWS,), tl.float32)
            for start in range(0, kb, BLOCK_B):
                o = start + o_b
                t, s = _load_both(
                    logits_row, target_row, mapping_ptr, o, ka, kb, stride_l, stride_t, HAS_MAPPING
                )
                more_p, more_q, more = _terms(t, s, top_p, top_q, inverse_temperature)
                sum_p += more_p
                sum_q += more_q
                cross += more
        else:
            sum_p, sum_q, cross = _terms(t, s, top_p, top_q, inverse_temperature)
        agrees = first_p == first_q
        mean = cross / sum_p
        # The log of the ratio is small and exact where two logs would cancel.
        kl = mean + tl.log(sum_q / sum_p)
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if ONLY_AGREEING:
            weight = tl.where(agrees | (kl != kl), 1.0, 0.0)
        counted = tl.where(m_row & (weight > 0), kl, 0.0)
        tl.store(loss_ptr + pid, tl.sum(counted, axis=0) * scale)
        agreement = tl.sum((agrees & m_row).to(tl.int32), axis=0)
        tl.store(agreement_ptr + pid, agreement.to(tl.int64))
        tl.store(rows_ptr + row, top_q, mask=m_row)
        tl.store(rows_ptr + n_rows + row, 1 / sum_q, mask=m_row)
        tl.store(rows_ptr + 2 * n_rows + row, top_p, mask=m_row)
        tl.store(rows_ptr + 3 * n_rows + row, 1 / sum_p, mask=m_row)
        tl.store(rows_ptr + 4 * n_rows + row, mean, mask=m_row)
        tl.store(rows_ptr + 5 * n_rows + row, weight, mask=m_row)
    elif INVERT:
        _invert(pid - row_programs, mapping_ptr, inverse_ptr, ka, kb, INVERT_BLOCK)


@dispatch.jit
def _mapped_kl_sum_kernel(
    loss_parts_ptr,  # (P,)
    agreement_parts_ptr,  # (P,)
    loss_ptr,  # ()
    agreement_ptr,  # ()
    n_parts,
    BLOCK: tl.constexpr,
):
    loss = tl.zeros((BLOCK,), tl.float32)
    agreement = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n_parts, BLOCK):
        o = start + tl.arange(0, BLOCK)
        loss += tl.load(loss_parts_ptr + o, mask=o < n_parts, other=0.0)
        agreement += tl.load(agreement_parts_ptr + o, mask=o < n_parts, other=0)
    tl.store(loss_ptr, tl.sum(loss, axis=0))
    tl.store(agreement_ptr, tl.sum(agreement, axis=0))


@dispatch.jit
def _pull(q, inverse, o_a, target_row, mapping_ptr, kb, stride, top_p, norm_p, inverse_temperature):
    """Σ_{j: mapping[j] = c} (q_c - p_j) for classes c = o_a of the mapped side."""
    repeats = (inverse >> 32)[None, :]
    at = target_row + (inverse & 4294967295)[None, :] * stride
    t = tl.load(at, mask=repeats == 1, other=-float("inf")).to(tl.float32)
    pulled = tl.where(repeats == 1, q - tl.exp((t - top_p) * inverse_temperature) * norm_p, 0.0)
    if tl.max(inverse, axis=0) >= 8589934592:
        # A class of this block stands for several target classes: add those up in order.
        summed = tl.zeros(pulled.shape, tl.float32)
        at_j = target_row
        for j in range(kb):
            t_j = tl.load(at_j).to(tl.float32)
            p_j = tl.exp((t_j - top_p) * inverse_temperature) * norm_p
            hit = tl.load(mapping_ptr + j) == o_a
            summed += tl.where(hit[None, :], q - p_j, 0.0)
            at_j += stride
        pulled = tl.where(repeats > 1, summed, pulled)
    return pulled


@dispatch.jit
def _mapped_kl_bwd_kernel(
    grad_ptr,  # () cotangent of the loss
    logits_ptr,  # (N, Ka), any strides
    target_ptr,  # (N, Kb), any strides
    mapping_ptr,  # (Kb,) int64 where HAS_MAPPING
    rows_ptr,  # (6, N) fp32, from the forward
    inverse_ptr,  # (Ka,) int64 where HAS_MAPPING and NEED_LOGITS
    grad_logits_ptr,  # (N, Ka) where NEED_LOGITS
    grad_target_ptr,  # (N, Kb) where NEED_TARGET
    n_rows, ka, kb,
    stride_logits_row, stride_l, stride_target_row, stride_t,
    inverse_temperature, scale,
    HAS_MAPPING: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_TARGET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = (o_row < n_rows)[:, None]
    row = tl.minimum(o_row, n_rows - 1).to(tl.int64)
    top_q = tl.load(rows_ptr + row)[:, None]
    norm_q = tl.load(rows_ptr + n_rows + row)[:, None]
    top_p = tl.load(rows_ptr + 2 * n_rows + row)[:, None]
    norm_p = tl.load(rows_ptr + 3 * n_rows + row)[:, None]
    mean = tl.load(rows_ptr + 4 * n_rows + row)[:, None]
    counted = tl.load(rows_ptr + 5 * n_rows + row)[:, None] > 0
    factor = tl.load(grad_ptr).to(tl.float32) * scale
    logits_row = logits_ptr + row[:, None] * stride_logits_row
    target_row = target_ptr + row[:, None] * stride_target_row
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if NEED_TARGET or not HAS_MAPPING:
        t, s = _load_both(
            logits_row, target_row, mapping_ptr, o, ka, kb, stride_l, stride_t, HAS_MAPPING
        )
        z_p = (t - top_p) * inverse_temperature
        z_q = (s - top_q) * inverse_temperature
        p = tl.exp(z_p) * norm_p
        m_b = m_row & (o < kb)[None, :]
        if NEED_TARGET:
            g_t = tl.where(counted & (p != 0), p * (z_p - z_q - mean) * factor, 0.0)
            at_t = grad_target_ptr + row[:, None] * kb + o[None, :]
            tl.store(at_t, g_t.to(grad_target_ptr.dtype.element_ty), mask=m_b)
        if NEED_LOGITS and not HAS_MAPPING:
            g_s = tl.where(counted, (tl.exp(z_q) * norm_q - p) * factor, 0.0)
            at_s = grad_logits_ptr + row[:, None] * ka + o[None, :]
            tl.store(at_s, g_s.to(grad_logits_ptr.dtype.element_ty), mask=m_b)
    if NEED_LOGITS and HAS_MAPPING:
        m_a = o < ka
        at = logits_row + (o.to(tl.int64) * stride_l)[None, :]
        own = tl.load(at, mask=m_a[None, :], other=-float("inf")).to(tl.float32)
        q = tl.exp((own - top_q) * inverse_temperature) * norm_q
        inverse = tl.load(inverse_ptr + o, mask=m_a, other=0)
        pulled = _pull(
            q, inverse, o, target_row, mapping_ptr, kb, stride_t, top_p, norm_p, inverse_temperature
        )
        g_a = tl.where(counted, pulled * factor, 0.0)
        at_a = grad_logits_ptr + row[:, None] * ka + o[None, :]
        tl.store(at_a, g_a.to(grad_logits_ptr.dtype.element_ty), mask=m_row & m_a[None, :])


def launch_fwd(
    logits: Tensor, target: Tensor, mapping: Tensor | None, temperature: float,
    only_agreeing: bool, invert: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, agreement, rows (6, N), inverse (Ka,)); the last is empty unless ``invert``."""
    (n_rows, ka), kb = logits.shape, target.shape[1]
    mapping = None if mapping is None else mapping.contiguous()
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(kb)))
    tile = ONE_PROGRAM if n_rows * block <= ONE_PROGRAM else TILE
    rows = min(triton.next_power_of_2(n_rows), max(1, tile // block))
    programs = triton.cdiv(n_rows, rows)
    loss = logits.new_empty(programs, dtype=torch.float32)
    agreement = logits.new_empty(programs, dtype=torch.int64)
    statistics = logits.new_empty(6, n_rows, dtype=torch.float32)
    inverse = logits.new_zeros(ka if invert else 0, dtype=torch.int64)
    dispatch.launch(
        _mapped_kl_fwd_kernel,
        (programs + (triton.cdiv(kb, INVERT_BLOCK) if invert else 0),),
        logits, target, mapping, loss, agreement, statistics, inverse,
        n_rows, ka, kb, programs, *logits.stride(), *target.stride(),
        1 / temperature, temperature**2 / n_rows,
        HAS_MAPPING=mapping is not None, INVERT=invert, ONLY_AGREEING=only_agreeing,
        ROWS=rows, BLOCK_B=block, CHUNKED=kb > block, INVERT_BLOCK=INVERT_BLOCK,
        num_warps=8 if rows * block <= 4096 else 16,
    )  # fmt: skip
    if programs == 1:
        return loss.view(()), agreement.view(()), statistics, inverse
    total, agreeing = loss.new_empty(()), agreement.new_empty(())
    dispatch.launch(
        _mapped_kl_sum_kernel, (1,), loss, agreement, total, agreeing, programs, BLOCK=SUM_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return total, agreeing, statistics, inverse


def launch_bwd(
    grad: Tensor, logits: Tensor, target: Tensor, mapping: Tensor | None, statistics: Tensor,
    inverse: Tensor, temperature: float, need_logits: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_logits, grad_target), each of size 0 unless needed."""
    (n_rows, ka), kb = logits.shape, target.shape[1]
    mapping = None if mapping is None else mapping.contiguous()
    grad_logits = logits.new_empty((n_rows, ka) if need_logits else (0,))
    grad_target = target.new_empty((n_rows, kb) if need_target else (0,))
    columns = max(ka if need_logits else 0, kb if need_target else 0)
    block = min(1024, max(16, triton.next_power_of_2(columns)))
    rows = min(triton.next_power_of_2(n_rows), TILE // block)
    dispatch.launch(
        _mapped_kl_bwd_kernel,
        (triton.cdiv(n_rows, rows), triton.cdiv(columns, block)),
        grad, logits, target, mapping, statistics, inverse, grad_logits, grad_target,
        n_rows, ka, kb, *logits.stride(), *target.stride(), 1 / temperature,
        temperature / n_rows,
        HAS_MAPPING=mapping is not None, NEED_LOGITS=need_logits, NEED_TARGET=need_target,
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return grad_logits, grad_target
