"""The six fused operations at benchmark sizes: inputs, the four ways to run them, bytes and FLOP.

``reference`` is what upstream composes from torch's own operations, ``eager`` the twin,
``compile`` the twin under torch.compile, ``fast`` the public function (on a CPU the twin again).
Bytes are those the operation has to move, from each kernel's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sizes import Scale
from torch import Tensor
from world import MEAN, STD, smooth_images

from kiop_fast import kernels, reference
from kiop_fast.kernels.prompt_pad import ring_padding
from kiop_fast.reference.views import global_view, local_view, normalise
from kiop_fast.runtime import draws

Function = Callable[..., Sequence[Tensor] | Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
        inputs: fp64 tensors; floating ones are cast to the precision that is timed.
        differentiable: places of the inputs that get gradients.
        reference, eager, fast: the same function of the inputs.
        elements: (forward, backward) elements of the timed precision moved at least.
        fixed_bytes: (forward, backward) bytes moved whatever the precision.
        flop: of the forward.
        sizes: for the digest and the reader.
    """

    name: str
    inputs: tuple[Tensor, ...]
    differentiable: tuple[int, ...]
    reference: Function
    eager: Function
    fast: Function
    elements: tuple[float, float]
    fixed_bytes: tuple[float, float] = (0.0, 0.0)
    flop: float = 0.0
    sizes: str = ""

    def bytes_moved(self, dtype: torch.dtype, *, backward: bool) -> float:
        """Of the forward, or of both passes."""
        passes = slice(0, 2 if backward else 1)
        return sum(self.elements[passes]) * dtype.itemsize + sum(self.fixed_bytes[passes])


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal fp64 numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prompt_pad(scale: Scale) -> Operation:
    config = scale.problem.config
    side, rings, batch = config.side, list(config.prompt.rings), config.storing.batch
    sides = [side, *rings]
    cells = [
        normal(k, 3, b * b - a * a) for k, (a, b) in enumerate(zip(sides, rings, strict=False))
    ]
    border = rings[-1] ** 2 - side**2

    def by_reference(image: Tensor, *cells: Tensor) -> Tensor:
        for inner, outer, ring in zip(sides, rings, cells, strict=False):
            left, right = ring_padding(inner, outer)
            square = ring.new_zeros(3, outer * outer)
            where = kernels.border_index(inner, outer).to(image.device)
            square = square.index_copy(1, where, ring).view(3, outer, outer)
            mask = F.pad(image.new_zeros(inner, inner), (left, right, left, right), value=1.0)
            image = F.pad(image, (left, right, left, right)) + torch.sigmoid(square) * mask
        return image

    return Operation(
        "prompt_pad", (normal(9, batch, 3, side, side), *cells), tuple(range(1, 1 + len(cells))),
        by_reference,
        lambda image, *cells: kernels.prompt_pad_eager(image, cells, rings),
        lambda image, *cells: kernels.prompt_pad(image, cells, rings),
        elements=(3 * batch * (side**2 + rings[-1] ** 2), 3 * border * (batch + 1)),
        sizes=f"{batch} images {side} → {' → '.join(map(str, rings))}",
    )  # fmt: skip


def mapped_kl(scale: Scale, rows: int = 0, classes: tuple[int, int] = (0, 0)) -> Operation:
    ka, kb = classes if rows else scale.problem.classes[:2]
    rows = rows or scale.problem.config.storing.batch
    mapping = torch.randperm(ka, generator=torch.Generator().manual_seed(0))[:kb]
    read, temperature = rows * (ka + kb), 20.0

    def by_reference(logits: Tensor, target: Tensor, mapping: Tensor) -> Tensor:
        return reference.kl(logits[:, mapping], target, temperature)

    return Operation(
        "mapped_kl", (3 * normal(1, rows, ka), 3 * normal(2, rows, kb), mapping), (0, 1),
        by_reference,
        lambda a, b, m: kernels.mapped_kl_eager(a, b, m, temperature)[0],
        lambda a, b, m: kernels.mapped_kl(a, b, m, temperature).loss,
        elements=(read, 2 * read), sizes=f"{rows} rows, {ka} classes seen as {kb}",
    )  # fmt: skip


def info_nce(scale: Scale) -> Operation:
    rows, width, temperature = scale.info_nce_rows, 256, 0.6
    keys = F.normalize(normal(1, rows, width), dim=1)
    queries = F.normalize(keys + normal(2, rows, width), dim=1)
    weights = torch.full((rows,), 1.0 / rows, dtype=torch.float64)

    def by_reference(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        logits = torch.mm(q, k.detach().T) / temperature
        labels = torch.arange(len(q), device=q.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses.float() * w.float()).sum() if q.dtype.itemsize < 4 else (losses * w).sum()

    return Operation(
        "info_nce", (queries, keys, weights), (0,), by_reference,
        lambda q, k, w: kernels.info_nce_eager(q, k, temperature, w),
        lambda q, k, w: kernels.info_nce(q, k, temperature, w),
        elements=(3 * rows * width, 2 * rows * width), flop=4.0 * rows * rows * width,
        sizes=f"{rows} × {rows}, width {width}",
    )  # fmt: skip


def bn_match(scale: Scale) -> Operation:
    batch, side = scale.problem.config.synthesis.batch, scale.problem.config.side // 2
    channels = 64 if scale.name == "paper" else 16
    x = 2 * normal(1, 2 * batch, channels, side, side)
    vectors = (0.3 * normal(2, channels), normal(3, channels).square() + 0.5,
               normal(4, channels) + 1, normal(5, channels))  # fmt: skip

    def by_reference(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Any:
        head = x[:batch]
        by_channel = head.transpose(0, 1).contiguous().flatten(1)
        loss = torch.norm(var - by_channel.var(1, unbiased=False), 2)
        loss = loss + torch.norm(mean - head.mean((0, 2, 3)), 2)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5), loss, x.mean((2, 3))

    return Operation(
        "bn_match", (x, *vectors), (0,), by_reference,
        lambda x, *layer: list(kernels.bn_match_eager(x, *layer, 1e-5, rows=batch)),
        lambda x, *layer: list(kernels.bn_match(x, *layer, 1e-5, rows=batch)),
        elements=(2 * x.numel(), 3 * x.numel()), sizes=f"input {tuple(x.shape)}",
    )  # fmt: skip


def views(scale: Scale) -> Operation:
    config = scale.problem.config.synthesis
    batch, side = config.batch, scale.problem.config.side
    rng = draws.generator(0, 0, "views", "benchmark")
    images = smooth_images(batch, side).double() / 255
    tables = (draws.crop_offsets(rng, (batch,), config.pad), draws.flips(rng, (batch,), 0.5),
              draws.resized_crop_boxes(rng, (batch,), side, config.scale, config.ratio),
              draws.flips(rng, (batch,), 0.5))  # fmt: skip
    normaliser = {"pad": config.pad, "mean": MEAN, "std": STD}

    def by_reference(images: Tensor, crop: Tensor, flip: Tensor, box: Tensor, flip2: Tensor) -> Any:
        both = global_view(images, crop, flip, config.pad), local_view(images, box, flip2)
        return torch.cat([normalise(view, MEAN, STD) for view in both])

    return Operation(
        "views", (images, *tables), (0,), by_reference,
        _with_tensors(kernels.views_eager, normaliser), _with_tensors(kernels.views, normaliser),
        elements=(4 * images.numel(), 3 * images.numel()),
        sizes=f"{batch} images of {side}, two views each",
    )  # fmt: skip


def bank_replay(scale: Scale) -> Operation:
    batch, side = scale.problem.config.storing.batch, scale.problem.config.side
    rng = draws.generator(0, 0, "bank_replay", "benchmark")
    bank = smooth_images(scale.data_bank, side)
    index = draws.permutation_batches(rng, 1, batch, len(bank))[0]
    tables = (draws.crop_offsets(rng, (batch,), 4), draws.flips(rng, (batch,), 0.5))
    like = torch.zeros(())

    def by_reference(bank: Tensor, index: Tensor, crop: Tensor, flip: Tensor, like: Tensor) -> Any:
        images = bank[index].to(like.dtype) / 255
        return normalise(global_view(images, crop, flip, 4), MEAN, STD)

    def ours(function: Function) -> Function:
        made: dict[Any, list[Tensor]] = {}

        def call(bank: Tensor, index: Tensor, crop: Tensor, flip: Tensor, like: Tensor) -> Any:
            wide = torch.promote_types(like.dtype, torch.float32)
            if (bank.device, wide) not in made:
                made[bank.device, wide] = [
                    torch.tensor(x, dtype=wide, device=bank.device) for x in (MEAN, STD)
                ]
            mean, std = made[bank.device, wide]
            return function(bank, index, crop=crop, flip=flip, pad=4, mean=mean, std=std,
                            dtype=like.dtype)  # fmt: skip

        return call

    pixels = batch * 3 * side * side
    return Operation(
        "bank_replay", (bank, index, *tables, like.double()), (), by_reference,
        ours(kernels.bank_replay_eager), ours(kernels.bank_replay),
        elements=(pixels, 0), fixed_bytes=(pixels, 0),
        sizes=f"{batch} of {len(bank)} images of {side}, cropped, flipped",
    )  # fmt: skip


def _with_tensors(function: Function, normaliser: dict[str, Any]) -> Function:
    """``function`` with the normaliser as tensors that are made once a device and dtype."""
    made: dict[Any, dict[str, Any]] = {}

    def call(images: Tensor, *tables: Tensor) -> Any:
        wide = torch.promote_types(images.dtype, torch.float32)
        if (images.device, wide) not in made:
            like: dict[str, Any] = {"dtype": wide, "device": images.device}
            made[images.device, wide] = {
                "pad": normaliser["pad"], "mean": torch.tensor(normaliser["mean"], **like),
                "std": torch.tensor(normaliser["std"], **like),
            }  # fmt: skip
        return function(images, *tables, **made[images.device, wide])

    return call


OPERATIONS: dict[str, Callable[[Scale], Operation]] = {
    "prompt_pad": prompt_pad,
    "mapped_kl": mapped_kl,
    "info_nce": info_nce,
    "bn_match": bn_match,
    "views": views,
    "bank_replay": bank_replay,
}
LARGE: dict[str, Callable[[Scale], Operation]] = {  # at scale paper, on a GPU
    "mapped_kl, large": lambda scale: mapped_kl(scale, 16384, (1000, 1000)),
}
