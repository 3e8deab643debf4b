"""One knowledge storing period, its batches read from PNGs by loader processes (SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms

from kiop_fast.reference.banks import WORKERS, ImageBank, to_pil
from kiop_fast.store import StoringDraws, Term, in_drawn_colours

Key = tuple[int, int, int, bool]  # row of the bank, top and left of the crop, flip


class Storing:
    """Periods of one run, one by one; as :class:`kiop_fast.store.Storing`."""

    def __init__(self, terms: Sequence[Term], optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.terms, self.optimizer, self.steps = terms, optimizer, steps

    def run(
        self,
        drawn: Mapping[str, StoringDraws],
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """One period."""
        return store(self.terms, drawn, self.optimizer, self.steps, on_step)


def store(
    terms: Sequence[Term],
    drawn: Mapping[str, StoringDraws],
    optimizer: torch.optim.Optimizer,
    steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """One period; the optimizer's parameters move, nothing else does.

    Arguments and result as :func:`kiop_fast.store.store`: (steps, 2 · len(terms)), each term's
    unweighted loss, then each term's share of rows whose arg-max agrees.
    """
    batches = [_batches(term, drawn[term.name]) for term in terms]
    log = []
    for step in range(steps):
        results = [term.loss(next(it)) for term, it in zip(terms, batches, strict=True)]
        total = torch.stack(
            [term.weight * r.loss for term, r in zip(terms, results, strict=True)]
        ).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rows = [drawn[term.name].index.shape[1] for term in terms]
        shares = [r.agreement.item() / n for r, n in zip(results, rows, strict=True)]
        log.append([r.loss.item() for r in results] + shares)
        if on_step is not None:
            on_step(step + 1, total.detach())
    return torch.tensor(log)


def _batches(term: Term, drawn: StoringDraws) -> Iterator[Tensor]:
    """The bank's batches, normalised, in the drawn order.

    As upstream's, the loader starts its processes anew whenever the bank has been gone through
    once.
    """
    bank = term.bank
    files = bank.files if isinstance(bank, ImageBank) else None
    images = None if isinstance(bank, ImageBank) else bank.images.cpu()
    device = bank.device if isinstance(bank, ImageBank) else bank.images.device
    workers = bank.workers if isinstance(bank, ImageBank) else WORKERS
    stored = _Stored(files, images, drawn.pad, term.source.info.mean, term.source.info.std)
    keys = [_keys(drawn, step) for step in range(len(drawn.index))]
    once = -(-len(stored) // drawn.index.shape[1])
    for first in range(0, len(keys), once):
        loader = DataLoader(
            stored, batch_sampler=keys[first : first + once], num_workers=workers,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        for step, batch in enumerate(loader, start=first):
            batch = batch.to(device, non_blocking=True)
            orders = None if drawn.colours is None else drawn.colours[step]
            yield in_drawn_colours(_averaged(batch) if term.average_grey else batch, orders)


def _keys(drawn: StoringDraws, step: int) -> list[Key]:
    rows = drawn.index[step].tolist()
    corners = [(drawn.pad, drawn.pad)] * len(rows)
    if drawn.crop is not None:
        corners = drawn.crop[step].tolist()
    flips = [False] * len(rows) if drawn.flip is None else drawn.flip[step].tolist()
    return [(row, *corner, flip) for row, corner, flip in zip(rows, corners, flips, strict=True)]


def _averaged(batch: Tensor) -> Tensor:
    """Upstream's grey: the colours' mean, three times."""
    return batch.mean(dim=1, keepdim=True).repeat(1, 3, 1, 1)


class _Stored(Dataset[Tensor]):
    """Images in PNG files (or, real data, in memory), transformed one by one as pictures."""

    def __init__(
        self,
        files: list[Path] | None,
        images: Tensor | None,
        pad: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.files, self.images, self.pad, self.mean, self.std = files, images, pad, mean, std
        self.dtype = torch.get_default_dtype()

    def __len__(self) -> int:
        held = self.files if self.images is None else self.images
        return 0 if held is None else len(held)

    def __getitem__(self, key: Key) -> Tensor:
        row, top, left, flip = key
        picture = self._picture(row)
        if self.pad:
            side = picture.height
            picture = transforms.crop(transforms.pad(picture, self.pad), top, left, side, side)
        if flip:
            picture = transforms.hflip(picture)
        image = transforms.to_tensor(picture).to(self.dtype)
        if len(image) == 1:
            image = image.repeat(3, 1, 1)
        return transforms.normalize(image, list(self.mean), list(self.std))

    def _picture(self, row: int) -> Image.Image:
        if self.images is not None:
            return to_pil(self.images[row])
        assert self.files is not None
        return Image.open(self.files[row])
