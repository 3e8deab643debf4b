"""What a dataset is: facts that travel with a model, and two splits read on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from torch import Tensor

from kiop_fast.errors import DataError

if TYPE_CHECKING:
    from kiop_fast.data.files import FileSplit


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset; no image is read to know them.

    Attributes:
        name: the dataset's name.
        side: native image side, pixels.
        channels: 1 for grey data (repeated to three on the way into a model), else 3.
        classes: class names, in label order.
        mean, std: per-channel statistics (three each) the source models were trained with;
            images in [0, 1] are normalised to ``(x - mean) / std``.
        pad, flip: the training augmentation, zero-padded random crop and horizontal flip.
    """

    name: str
    side: int
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pad: int = 0
    flip: float = 0.0

    @property
    def task(self) -> str:
        """The name of its task in tables and files: of ``folder:PATH`` the last part."""
        return PurePath(self.name).name.removeprefix("folder:").strip(".") or "folder"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"dataset {self.name!r}: channels", got=self.channels, expected="1, 3")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"dataset {self.name!r}: mean and std", got=(self.mean, self.std),
                            expected="three numbers each, std above 0")  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Images (N, C, s, s) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise DataError(
                "images and labels do not fit together",
                got=f"images {tuple(self.images.shape)}, labels {tuple(self.labels.shape)}",
                expected="images (N, C, s, s), labels (N,)",
            )


@dataclass(frozen=True)
class Dataset:
    """The seam for any data: facts, and readers of the two splits at an image side.

    A reader returns images in memory, or image files (:class:`kiop_fast.data.FileSplit`).
    Only ``pretrain`` and mode ``b`` (for A) read ``train``; only the evaluation room reads
    ``test``.
    """

    info: DatasetInfo
    train: Callable[[int], Split | FileSplit]
    test: Callable[[int], Split | FileSplit]
