"""bank_replay: a batch out of the uint8 image bank, augmented and normalised in one pass.

The reader of the knowledge storing period (SPEC section 5; upstream reads PNG files through a
DataLoader).  For row n, channel c, output pixel (y, x), with x' = s - 1 - x where flipped, else x:

    result[n,c,y,x] = (P[index_n, c, top_n + y, left_n + x'] / 255 - mean_c) / std_c

P is the bank's image in a black frame of ``pad`` pixels; without ``crop``, top = left = pad.

    bank (M, C, s, s) uint8;  index (N,);  crop (N, 2);  flip (N,);  result (N, Cout, s, s)
    bytes  N · C · s² read, N · Cout · s² · size of the result's dtype written
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch
from kiop_fast.kernels.bank_replay_triton import launch
from kiop_fast.kernels.crop import (
    check_crop,
    check_dtype,
    check_normaliser,
    check_table,
    crop_window,
    empty_images,
    flipped_columns,
    require_rows,
    stored,
    unsupported_result,
)


def bank_replay_eager(
    bank: Tensor,
    index: Tensor,
    *,
    crop: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """The same in plain torch.

    Crops and flips happen on bytes, a quarter of the floats they become.
    """
    images = bank.index_select(0, index)
    side = bank.shape[-1]
    if crop is not None:
        rows = crop[:, :1] + torch.arange(side, device=crop.device)
        columns = torch.arange(side, device=crop.device).expand(len(index), -1)
        columns = columns if flip is None else flipped_columns(side, flip)
        images = crop_window(images, rows, crop[:, 1:] + columns, pad)
    elif flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
    acc = torch.promote_types(dtype, torch.float32)
    scale = 1 / std.to(acc)[:, None, None]
    shift = mean.to(acc)[:, None, None] * scale
    return stored((images.to(acc) * (scale / 255)).sub_(shift), dtype, channels_last)


@torch.library.custom_op("kiop_fast::bank_replay", mutates_args=())
def _bank_replay(
    bank: Tensor,
    index: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if dispatch.use_triton("bank_replay", mean, std):
        return launch(bank, index, crop, flip, pad, mean, std, dtype, channels_last)
    return bank_replay_eager(
        bank, index, crop=crop, flip=flip, pad=pad,
        mean=mean, std=std, dtype=dtype, channels_last=channels_last,
    )  # fmt: skip


@_bank_replay.register_fake
def _(bank, index, crop, flip, pad, mean, std, dtype, channels_last):  # type: ignore[no-untyped-def]
    return empty_images(bank, index.shape[0], mean.shape[0], dtype, channels_last)


def bank_replay(
    bank: Tensor,
    index: Tensor,
    *,
    crop: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Gathers a training batch from the bank.

    Args:
        bank: (M, C, s, s) uint8, 255 is white.
        index: (N,) integers, the images wanted, in [0, M).
        crop: (N, 2) integers, top and left in the black frame, 0 to 2 · pad, pixels; None: no
            crop.
        flip: (N,) bool, mirror left to right; None: no flip.
        pad: width of the black frame, pixels.
        mean: (Cout,) of the normaliser.  A tensor on the bank's device costs no copy; inside a
            CUDA graph capture it has to be one.
        std: (Cout,).
        dtype: of the result.
        channels_last: store the result channels-last.

    Returns:
        (N, Cout, s, s), no gradient.  Cout is C, or 3 for C = 1 with a three-channel normaliser
        (grey repeated).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit; on the CPU also rows that are not
            in the bank and crops that leave the frame (on a GPU, looking would wait for it).
    """
    mean, std = check_normaliser("bank_replay", bank, mean, std)
    _check(bank, index, dtype)
    if crop is not None:
        check_crop("bank_replay", bank, crop, len(index), pad)
    if flip is not None:
        check_table("bank_replay", bank, "flip", flip, (len(index),), "bool")
    if dispatch.use_triton("bank_replay", mean, std, unsupported=unsupported_result(dtype)):
        return _bank_replay(bank, index, crop, flip, pad, mean, std, dtype, channels_last)
    return bank_replay_eager(
        bank, index, crop=crop, flip=flip, pad=pad,
        mean=mean, std=std, dtype=dtype, channels_last=channels_last,
    )  # fmt: skip


def _check(bank: Tensor, index: Tensor, dtype: torch.dtype) -> None:
    if bank.dtype != torch.uint8:
        raise KernelError(
            "bank_replay reads a bank of bytes",
            got=bank.dtype,
            expected="torch.uint8, 255 is white",
        )
    if index.numel() == 0:
        raise KernelError("bank_replay: the batch is empty", got=f"index {tuple(index.shape)}")
    check_table("bank_replay", bank, "index", index, (index.numel(),), "integer")
    if dispatch.on_host(index):
        expected = f"a row of the bank, 0 to {len(bank) - 1}"
        inside = (index >= 0) & (index < len(bank))
        require_rows("bank_replay", "index", index, inside, expected)
    check_dtype("bank_replay", dtype)
