"""The Triton kernels of bn_match; the math is in ``bn_match.py``.

Forward: one kernel reads x and writes the output, the image means and, a chunk of images each,
the channel sums; a second, of one program, adds up the chunks' sums and takes both norms.
Backward: one kernel.  No atomics: the order of every sum is fixed by the shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.kernels import dispatch
from kiop_fast.kernels.dispatch import tl, triton

# Not measured on a GPU yet.  A program holds at most TILE elements (at 2048 ptxas reported spills)
# of at most MAX_CHANNELS channels, so that narrow images still make programs enough; channels-last
# it takes LINE_CHANNELS, a whole memory line in fp32.  The batch is cut into at most CHUNKS parts,
# whose sums a single program can still add up.
TILE, MAX_CHANNELS, LINE_CHANNELS, CHUNKS = 1024, 128, 32, 32
LOSS_TILE = 4096
NUM_WARPS, LOSS_WARPS = 4, 8


@dispatch.jit
def _affine(o_c, m_c, weight_ptr, bias_ptr, running_var_ptr, eps, WEIGHT, BIAS):
    """scale and bias of channels o_c, (BLOCK_C,) fp32."""
    var = tl.load(running_var_ptr + o_c, mask=m_c, other=1.0).to(tl.float32)
    scale = tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))
    bias = tl.zeros(var.shape, tl.float32)
    if WEIGHT:
        scale *= tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return scale, bias


@dispatch.jit
def _bn_match_fwd_kernel(
    x_ptr,  # (N, C, P), contiguous or channels-last (N, P, C)
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    weight_ptr,  # (C,) where WEIGHT
    bias_ptr,  # (C,) where BIAS
    output_ptr,  # as x
    image_means_ptr,  # (N, C)
    sums_ptr,  # (chunks, 2, C): Σ(x - r) and Σ(x - r)² over a chunk's images below rows
    n_images, channels, pixels, rows, chunk_images, eps,
    CHANNELS_LAST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of chunk_images images, BLOCK_P pixels at a time."""
    chunk = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    shift = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    scale, bias = _affine(o_c, m_c, weight_ptr, bias_ptr, running_var_ptr, eps, WEIGHT, BIAS)
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    b_squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for i in range(chunk * chunk_images, min((chunk + 1) * chunk_images, n_images)):
        image = tl.zeros((), tl.int64) + i
        b_image = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, pixels, BLOCK_P):
            o_p = first + tl.arange(0, BLOCK_P)
            m_x = m_c[:, None] & (o_p < pixels)[None, :]
            if CHANNELS_LAST:
                o_x = (image * pixels + o_p[None, :]) * channels + o_c[:, None]
            else:
                o_x = (image * channels + o_c[:, None]) * pixels + o_p[None, :]
            b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32) - shift[:, None]
            b_y = b_x * scale[:, None] + bias[:, None]
            if RELU:
                b_y = tl.maximum(b_y, 0.0)
            tl.store(output_ptr + o_x, b_y.to(output_ptr.dtype.element_ty), mask=m_x)
            b_x = tl.where(m_x, b_x, 0.0)
            b_image += tl.sum(b_x, axis=1)
            b_squares += tl.where(i < rows, b_x * b_x, 0.0)
        tl.store(image_means_ptr + image * channels + o_c, shift + b_image / pixels, mask=m_c)
        b_sum += tl.where(i < rows, b_image, 0.0)
    o_sums = chunk.to(tl.int64) * 2 * channels + o_c
    tl.store(sums_ptr + o_sums, b_sum, mask=m_c)
    tl.store(sums_ptr + o_sums + channels, tl.sum(b_squares, axis=1), mask=m_c)


@dispatch.jit
def _bn_match_loss_kernel(
    sums_ptr,  # (chunks, 2, C)
    running_var_ptr,  # (C,)
    loss_ptr,  # ()
    slopes_ptr,  # (3, C): δ, d loss/d δ / n, 2 d loss/d v / n
    chunks,
    channels,
    count,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the chunks' sums in a fixed order, then both norms over the channels."""
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_sum = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    b_square = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, chunks, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        o_sums = o_k.to(tl.int64)[:, None] * 2 * channels + o_c[None, :]
        m_sums = (o_k < chunks)[:, None] & m_c[None, :]
        b_sum += tl.load(sums_ptr + o_sums, mask=m_sums, other=0.0)
        b_square += tl.load(sums_ptr + o_sums + channels, mask=m_sums, other=0.0)
    delta = tl.sum(b_sum, axis=0) / count
    var = tl.load(running_var_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    excess = tl.sum(b_square, axis=0) / count - delta * delta - var
    from_mean = tl.sqrt_rn(tl.sum(delta * delta, axis=0))
    from_var = tl.sqrt_rn(tl.sum(excess * excess, axis=0))
    # Where a norm is 0 so is all it divides: subgradient 0.
    by_mean = delta / (tl.where(from_mean > 0, from_mean, 1.0) * count)
    by_var = 2 * excess / (tl.where(from_var > 0, from_var, 1.0) * count)
    tl.store(loss_ptr, from_mean + from_var)
    tl.store(slopes_ptr + o_c, delta, mask=m_c)
    tl.store(slopes_ptr + channels + o_c, by_mean, mask=m_c)
    tl.store(slopes_ptr + 2 * channels + o_c, by_var, mask=m_c)


@dispatch.jit
def _bn_match_bwd_kernel(
    grad_output_ptr,  # as x, where GRAD_OUTPUT
    grad_loss_ptr,  # (), where GRAD_LOSS
    grad_means_ptr,  # (N, C), any strides, where GRAD_MEANS
    x_ptr,  # (N, C, P), contiguous or channels-last
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    weight_ptr,  # (C,) where WEIGHT
    bias_ptr,  # (C,) where BIAS
    slopes_ptr,  # (3, C)
    grad_ptr,  # as x
    channels,
    pixels,
    rows,
    stride_means_n,
    stride_means_c,
    eps,
    GRAD_OUTPUT: tl.constexpr,
    GRAD_LOSS: tl.constexpr,
    GRAD_MEANS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """BLOCK_C channels × BLOCK_P pixels of one image; x is read only where it is needed."""
    image = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < channels
    m_x = m_c[:, None] & (o_p < pixels)[None, :]
    m_rows = image + tl.zeros((BLOCK_C, 1), tl.int64) < rows
    if CHANNELS_LAST:
        o_x = (image * pixels + o_p[None, :]) * channels + o_c[:, None]
    else:
        o_x = (image * channels + o_c[:, None]) * pixels + o_p[None, :]
    b_x = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    if RELU or GRAD_LOSS:
        shift = tl.load(running_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        m_read = m_x if RELU else m_x & m_rows
        b_x += tl.load(x_ptr + o_x, mask=m_read, other=0.0).to(tl.float32) - shift[:, None]
    b_grad = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    if GRAD_OUTPUT:
        scale, bias = _affine(o_c, m_c, weight_ptr, bias_ptr, running_var_ptr, eps, WEIGHT, BIAS)
        b_grad += tl.load(grad_output_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        if RELU:
            b_grad = tl.where(b_x * scale[:, None] + bias[:, None] > 0, b_grad, 0.0)
        b_grad *= scale[:, None]
    if GRAD_MEANS:
        o_means = image * stride_means_n + o_c.to(tl.int64) * stride_means_c
        b_means = tl.load(grad_means_ptr + o_means, mask=m_c, other=0.0).to(tl.float32)
        b_grad += (b_means / pixels)[:, None]
    if GRAD_LOSS:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
        delta = tl.load(slopes_ptr + o_c, mask=m_c, other=0.0)
        by_mean = tl.load(slopes_ptr + channels + o_c, mask=m_c, other=0.0)
        by_var = tl.load(slopes_ptr + 2 * channels + o_c, mask=m_c, other=0.0)
        b_loss = by_mean[:, None] + by_var[:, None] * (b_x - delta[:, None])
        b_grad += tl.where(m_rows, grad_loss * b_loss, 0.0)
    tl.store(grad_ptr + o_x, b_grad.to(grad_ptr.dtype.element_ty), mask=m_x)


def empty_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten output, loss, image_means and slopes for a ``dense`` x."""
    acc = dispatch.accumulation_dtype(x)
    loss = x.new_empty((), dtype=acc)
    image_means = x.new_empty(x.shape[:2], dtype=acc)
    return torch.empty_like(x), loss, image_means, x.new_empty((3, x.shape[1]), dtype=acc)


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the two layouts the kernels walk, and whether it is channels-last."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _meta(
    x: Tensor, channels_last: bool, weight: Tensor | None, bias: Tensor | None, relu: bool
) -> dict[str, int]:
    """What both kernels are specialised by; BLOCK_C × BLOCK_P is a program's share of x."""
    all_c = triton.next_power_of_2(x.shape[1])
    all_p = triton.next_power_of_2(x.shape[2] * x.shape[3])
    if channels_last:
        block_c = min(all_c, LINE_CHANNELS)
        block_p = min(all_p, TILE // block_c)
    else:
        block_p = min(all_p, TILE // 2)
        block_c = min(all_c, MAX_CHANNELS, TILE // block_p)
    present = {"WEIGHT": weight is not None, "BIAS": bias is not None, "RELU": relu}
    layout = {"CHANNELS_LAST": channels_last, "BLOCK_C": block_c, "BLOCK_P": block_p}
    return present | layout | {"num_warps": NUM_WARPS}


def _pointers(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """The layer's vectors; in the place of an absent one stands one that is not read."""
    layer = (running_mean, running_var, weight, bias)
    return [(running_var if vector is None else vector).contiguous() for vector in layer]


def launch_fwd(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, rows: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """output, loss, image_means and the slopes the backward starts from."""
    x, channels_last = dense(x)
    output, loss, image_means, slopes = empty_results(x)
    count, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    chunk_images = triton.cdiv(count, CHUNKS)
    chunks = triton.cdiv(count, chunk_images)
    sums = image_means.new_empty(chunks, 2, channels)
    meta = _meta(x, channels_last, weight, bias, relu)
    dispatch.launch(
        _bn_match_fwd_kernel,
        (chunks, triton.cdiv(channels, meta["BLOCK_C"])),
        x,
        *_pointers(running_mean, running_var, weight, bias),
        *(output, image_means, sums),
        *(count, channels, pixels, rows, chunk_images, eps),
        **meta,
    )
    block_c = triton.next_power_of_2(channels)
    dispatch.launch(
        _bn_match_loss_kernel,
        (1,),
        *(sums, running_var.contiguous(), loss, slopes),
        *(chunks, channels, float(rows * pixels)),
        BLOCK_K=max(1, min(triton.next_power_of_2(chunks), LOSS_TILE // block_c)),
        BLOCK_C=block_c,
        num_warps=LOSS_WARPS,
    )
    return output, loss, image_means, slopes


def launch_bwd(
    grad_output: Tensor | None, grad_loss: Tensor | None, grad_means: Tensor | None, x: Tensor,
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    slopes: Tensor, eps: float, rows: int, relu: bool,
) -> Tensor:  # fmt: skip
    """dx, laid out as x; a cotangent that is None is not read."""
    x, channels_last = dense(x)
    grad = torch.empty_like(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    meta = _meta(x, channels_last, weight, bias, relu)
    blocks_c, blocks_p = (
        triton.cdiv(channels, meta["BLOCK_C"]),
        triton.cdiv(pixels, meta["BLOCK_P"]),
    )
    dispatch.launch(
        _bn_match_bwd_kernel,
        (len(x), blocks_c, blocks_p),
        x if grad_output is None else grad_output.contiguous(memory_format=layout),
        slopes if grad_loss is None else grad_loss,
        slopes if grad_means is None else grad_means,
        x,
        *_pointers(running_mean, running_var, weight, bias),
        *(slopes, grad),
        *(channels, pixels, rows),
        *((0, 0) if grad_means is None else grad_means.stride()),
        eps,
        GRAD_OUTPUT=grad_output is not None,
        GRAD_LOSS=grad_loss is not None,
        GRAD_MEANS=grad_means is not None,
        **meta,
    )
    return grad
