"""Running out of memory, explained: what is largest and which settings shrink it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kiop_fast.errors import OutOfMemoryError

_SETTINGS = (
    "synthesis.head_width=512 (projection head and its Adam)",
    "synthesis.bank_rows or synthesis.negatives (feature bank, contrastive logits)",
    "offload=true (on a GPU: heads and feature banks of tasks at rest go to host memory)",
    "synthesis.batch, storing.batch, evaluation.batch (activations)",
    "smaller prompt.rings (activations grow with the square of the canvas)",
)


def largest_tensors(count: int = 5, device: str = "") -> list[str]:
    """The largest tensors alive, ``(4800, 4800) float32, 92.2 MB``, each storage once.

    A block that several share goes by the largest of them that is not mere bytes.

    Args:
        device: type of device to look at; empty: all.
    """
    stores: dict[int, Tensor] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            place = _address(thing) if device in ("", thing.device.type) else 0
            if place and (place not in stores or _weight(thing) > _weight(stores[place])):
                stores[place] = thing
    return [_named(tensor) for tensor in sorted(stores.values(), key=_bytes, reverse=True)[:count]]


def _named(tensor: Tensor) -> str:
    shared = " and others" if _bytes(tensor) > tensor.nbytes else ""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {kind}{shared}, {_bytes(tensor) / 1e6:.1f} MB"


def _weight(tensor: Tensor) -> tuple[bool, int, int]:
    """How well a tensor names the block that it lies in."""
    return tensor.ndim > 1 or tensor.dtype != torch.uint8, tensor.nbytes, tensor.ndim


def _address(tensor: Tensor) -> int:
    """Of its memory; 0 where it has none, as what is on ``meta`` or stands for a traced tensor."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _bytes(tensor: Tensor) -> int:
    """Of the memory behind it, which an expanded tensor fills more than once."""
    return tensor.untyped_storage().nbytes()


def _is_shortage(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said


def _short_of(error: RuntimeError) -> str:
    """Type of the device whose memory does not suffice."""
    return "cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu"


@contextmanager
def explained_memory() -> Iterator[None]:
    """Inside, an allocation that fails raises an error that names tensors and settings.

    Raises:
        OutOfMemoryError: with torch's own words in its first line.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_shortage(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0]}",
            got="largest tensors: " + "; ".join(largest_tensors(device=_short_of(error))),
            expected="a run that fits; finished epochs are kept, --resume goes on from them",
            fix="shrink one of: " + "; ".join(_SETTINGS),
        ) from error
