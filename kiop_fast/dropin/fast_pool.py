"""The pool of synthetic images in memory, and the batches a script asks of it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kiop_fast.dropin.logs import write_pngs
from kiop_fast.errors import ConfigError
from kiop_fast.kernels import bank_replay
from kiop_fast.synthesize import quantise

_pools: weakref.WeakSet[Any] = weakref.WeakSet()


class PoolDataset(Dataset):
    """The pool's images as the scripts' loaders want them: one transformed picture an index.

    Attributes:
        images: file of each picture.
    """

    def __init__(self, pixels: Tensor, files: list[str], transform: Any) -> None:
        self.pixels, self.images, self.transform = pixels, files, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        picture = to_picture(self.pixels[index])
        return picture if self.transform is None else self.transform(picture)


def to_picture(pixels: Tensor) -> Image.Image:
    """(C, s, s) uint8 → a grey or RGB picture."""
    shown = pixels.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)


def fast_pool(kind: Any, count: Counter[str]) -> dict[str, Any]:
    """Methods for ``ImagePool``: images stay as one tensor; the PNGs are written as ever."""
    plain_init = kind.__init__

    def __init__(self: Any, root: str) -> None:
        plain_init(self, root)
        refuse_shared(Path(self.root))
        _pools.add(self)

    def add(self: Any, imgs: Tensor, *rest: Any, **named: Any) -> None:
        """As the original: ``add(imgs, cn, targets)`` or ``add(imgs, targets)``."""
        grey = (rest[:1] == (1,) or named.get("cn") == 1) and imgs.shape[1] > 1
        add_pixels(self, quantise(imgs.detach()[:, :1] if grey else imgs.detach()))
        count["ImagePool.add"] += 1

    def get_dataset(self: Any, transform: Any = None, labeled: bool = True) -> PoolDataset:
        return PoolDataset(pixels_of(self), list(self.__dict__.get("files", [])), transform)

    return {"__init__": __init__, "add": add, "get_dataset": get_dataset}


def add_pixels(pool: Any, pixels: Tensor) -> None:
    """Add (N, C, s, s) uint8 to a pool and write their PNGs."""
    call, rows = pool._idx, len(pixels)
    write_pngs(pixels, Path(pool.root), call * rows, rows)
    files = [f"{pool.root}/{call}-{row}.png" for row in range(rows)]
    pool.files = pool.__dict__.get("files", []) + files
    old = pixels_of(pool)
    pool.pixels = torch.cat([old, pixels]) if len(old) else pixels
    pool._idx += 1


def pixels_of(pool: Any) -> Tensor:
    """All images of a pool, (M, C, s, s) uint8."""
    none = torch.empty(0, dtype=torch.uint8)
    found: Tensor = pool.__dict__.get("pixels", none)
    return found


def refuse_shared(root: Path) -> None:
    """Raise ConfigError for a folder of old images, or of another pool in this process."""
    taken = any(Path(pool.root) == root for pool in _pools)
    if taken or any(root.glob("*.png")):
        raise ConfigError(
            "the folder for synthetic images is not empty" if not taken
            else "two pools of synthetic images would share one folder",
            got=root, expected="an empty folder of its own: the script would mix the images",
            fix="delete it, or choose other --save_dir, --save_dir_1 …",
        )  # fmt: skip


class Batches:
    """Shuffled batches of a pool, transformed on the device; epoch after epoch.

    Args:
        pixels: (M, C, s, s) uint8.
        transform: the script's; what is not understood runs picture by picture.
        extra: further images (``--cmi_init``), a dataset with the same transform, or None.
        order: makes the order of an epoch, (count,) int64; by default torch's global randperm.
    """

    def __init__(
        self, pixels: Tensor, transform: Any, batch: int, device: torch.device,
        extra: Dataset | None = None, order: Callable[[int], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.pixels, self.batch, self.device = pixels.to(device), batch, device
        self.extra = extra
        self.order = order or torch.randperm
        self.one_by_one = transform
        self.plan = Plan.of(transform, pixels)
        self._left: Iterator[Tensor] = iter(())

    def next(self) -> Tensor:
        """The next batch; the last one of an epoch can be smaller."""
        index = next(self._left, None)
        if index is None:
            count = len(self.pixels) + (len(self.extra) if self.extra is not None else 0)  # type: ignore[arg-type]
            self._left = iter(self.order(count).split(self.batch))
            index = next(self._left)
        return self.at(index)

    def at(self, index: Tensor) -> Tensor:
        """The images at ``index``, transformed."""
        own = index < len(self.pixels)
        if self.plan is not None and bool(own.all()):
            return self.plan.apply(self.pixels, index)
        made = []
        for i in index.tolist():
            if i < len(self.pixels):
                made.append(self.one_by_one(to_picture(self.pixels[i])))
            else:
                made.append(self.extra[i - len(self.pixels)])  # type: ignore[index]
        return torch.stack(made).to(self.device)


class Plan:
    """A torchvision transform as one operation on a batch: crop, flip, normalise."""

    def __init__(self, side: int) -> None:
        self.side, self.pad, self.flip = side, 0, 0.0
        self.mean, self.std = [0.0] * 3, [1.0] * 3
        self.after: list[Callable[[Tensor], Tensor]] = []

    @classmethod
    def of(cls, transform: Any, pixels: Tensor) -> Plan | None:
        """The plan for a transform; None for one with parts that are not known."""
        plan, tensor = cls(pixels.shape[-1]), False
        if pixels.shape[1] != 3:
            return None
        for part in getattr(transform, "transforms", [None]):
            name = type(part).__name__
            if name == "ToTensor" and not tensor:
                tensor = True
            elif not plan._take(name, part, tensor):
                return None
        return plan if tensor and plan._right(transform, pixels) else None

    def _take(self, name: str, part: Any, tensor: bool) -> bool:
        """Add a part; whether it is known at this place."""
        if name == "Resize":
            size = part.size if isinstance(part.size, int) else tuple(part.size)
            return size in (self.side, (self.side,), (self.side, self.side))
        if name == "RandomCrop" and not tensor and not self.flip:
            known = isinstance(part.padding, int) and part.padding_mode == "constant"
            self.pad = part.padding if known else 0
            return (known and part.fill == 0 and not part.pad_if_needed
                    and tuple(part.size) == (self.side, self.side))  # fmt: skip
        if name == "RandomHorizontalFlip" and not tensor:
            self.flip = float(part.p)
            return True
        if name == "Normalize" and tensor and not self.after:
            self.mean, self.std = [float(v) for v in part.mean], [float(v) for v in part.std]
            return len(self.mean) == len(self.std) == 3
        if name == "Lambda" and tensor:
            self.after.append(part.lambd)
            return True
        return False

    def _right(self, transform: Any, pixels: Tensor) -> bool:
        """Without its random parts, does the plan give what the transform gives?"""
        if not self.after or self.pad or self.flip:
            return not self.after
        try:
            ours = self.apply(pixels[:2], torch.arange(len(pixels[:2])))
            theirs = torch.stack([transform(to_picture(image)) for image in pixels[:2]])
        except RuntimeError:  # not every function can be mapped over a batch
            return False
        return ours.shape == theirs.shape and torch.allclose(ours.cpu(), theirs, atol=1e-5)

    def apply(self, pixels: Tensor, index: Tensor) -> Tensor:
        """(n, C', s, s) fp32 of the images at ``index``, with fresh crops and flips."""
        count, device = len(index), pixels.device
        crop = torch.randint(0, 2 * self.pad + 1, (count, 2)) if self.pad else None
        flip = torch.rand(count) < self.flip if self.flip else None
        made = bank_replay(
            pixels, index.to(device), crop=None if crop is None else crop.to(device),
            flip=None if flip is None else flip.to(device), pad=self.pad,
            mean=torch.tensor(self.mean, device=device), std=torch.tensor(self.std, device=device),
            dtype=torch.get_default_dtype(),
        )  # fmt: skip
        for function in self.after:
            made = torch.vmap(function)(made)
        return made
