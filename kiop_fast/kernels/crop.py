"""What views and bank_replay share: crops out of a black frame, and the checks of their tables.

Tables drawn on the host (crops, boxes, flips, indices) are checked row by row only while they are
on the CPU: looking at a table on a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.errors import KernelError
from kiop_fast.kernels import dispatch


def flipped_columns(side: int, flip: Tensor) -> Tensor:
    """flip (N,) bool → (N, side) int64: the column shown at each output column."""
    columns = torch.arange(side, device=flip.device)
    return torch.where(flip[:, None], side - 1 - columns, columns)


def crop_window(images: Tensor, rows: Tensor, columns: Tensor, pad: int) -> Tensor:
    """Pixels ``rows`` × ``columns`` (N, s) of (N, C, s, s) images in a black frame of ``pad``."""
    count, channels, side, _ = images.shape
    wide = side + 2 * pad
    index = (rows[:, :, None] * wide + columns[:, None, :]).view(count, 1, -1)
    framed = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return framed.gather(2, index.expand(-1, channels, -1)).view_as(images)


def empty_images(
    like: Tensor, count: int, channels: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Unwritten (count, channels, s, s) beside (…, s, s) ``like``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (count, channels, *like.shape[2:])
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def stored(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Images in the dtype and layout asked for."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(dtype).contiguous(memory_format=layout)


def check_normaliser(
    op: str, images: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The images are (N, C, s, s) and mean, std fit them; returns both as tensors (Cout,)."""
    if images.ndim != 4 or images.shape[2] != images.shape[3] or 0 in images.shape:
        raise KernelError(
            f"{op} takes square images",
            got=f"{tuple(images.shape)}",
            expected="(N, C, s, s), none of them 0",
        )
    if not isinstance(mean, Tensor):
        mean = torch.tensor(mean, dtype=torch.float32, device=images.device)
    if not isinstance(std, Tensor):
        std = torch.tensor(std, dtype=torch.float32, device=images.device)
    channels = images.shape[1]
    if mean.shape != std.shape or mean.shape not in {(channels,), (3,) if channels == 1 else None}:
        raise KernelError(
            f"{op}: the normaliser does not fit the images",
            got=f"mean {tuple(mean.shape)}, std {tuple(std.shape)} for {channels} channels",
            expected=f"({channels},)" + (" or (3,), grey repeated" if channels == 1 else ""),
        )
    dispatch.require_floating(op, mean=mean, std=std)
    dispatch.require_same_device(op, images=images, mean=mean, std=std)
    return mean, std


def check_crop(op: str, images: Tensor, crop: Tensor, count: int, pad: int) -> None:
    """crop is (count, 2) integers that stay within the black frame of ``pad``."""
    if pad < 0:
        raise KernelError(f"{op}: pad must not be negative", got=pad, expected="0 or more")
    check_table(op, images, "crop", crop, (count, 2), "integer")
    if dispatch.on_host(crop):
        inside = ((crop >= 0) & (crop <= 2 * pad)).all(1)
        require_rows(op, "crop", crop, inside, f"top and left between 0 and {2 * pad} (2 · pad)")


def check_table(
    op: str, images: Tensor, name: str, table: Tensor, shape: tuple[int, ...], kind: str
) -> None:
    """A drawn table has its shape, its kind of numbers (integer | bool) and the images' device."""
    kinds = (torch.bool,) if kind == "bool" else (torch.int64, torch.int32)
    if table.shape != shape or table.dtype not in kinds:
        raise KernelError(
            f"{op}: {name} does not fit the batch",
            got=f"{tuple(table.shape)} {table.dtype}",
            expected=f"{shape} {' or '.join(str(kind) for kind in kinds)}",
        )
    dispatch.require_same_device(op, images=images, **{name: table})


def require_rows(op: str, name: str, table: Tensor, good: Tensor, expected: str) -> None:
    """Every row of a table on the host is good; the first that is not is shown."""
    if not good.all():
        row = int(good.logical_not().nonzero()[0])
        raise KernelError(
            f"{op}: row {row} of {name} is out of range", got=table[row].tolist(), expected=expected
        )


def check_dtype(op: str, dtype: torch.dtype | None) -> None:
    """The result's dtype, where asked for, is floating point."""
    if dtype is not None and not dtype.is_floating_point:
        raise KernelError(f"{op}: the result must be floating point", got=dtype)


def unsupported_result(dtype: torch.dtype) -> str:
    """Why a Triton kernel cannot write this dtype; empty if it can."""
    return "" if dtype in dispatch.KERNEL_DTYPES else f"a result of {dtype}"
