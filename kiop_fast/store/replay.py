"""A bank's batches on the device, by the step's number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kiop_fast.kernels import bank_replay
from kiop_fast.runtime.static_step import hold, row_of
from kiop_fast.store.draws import StoringDraws, in_drawn_colours
from kiop_fast.store.terms import Term

_CHUNK = 256  # images a forward pass while logits of a whole bank are computed


class Replay:
    """Batches of one term's bank, and what its frozen model says about them.

    Where nothing is done to an image but normalising it, the frozen model's logits are those of
    the bank's rows: computed once an image and run, and gathered.

    Args:
        term: whose bank.
        dtype: of the batches.
        device: where batches are made.

    Attributes:
        rows: images a batch.
    """

    def __init__(self, term: Term, dtype: torch.dtype, device: torch.device) -> None:
        self.term, self.device = term, device
        self.rows = 0
        self.mean = torch.tensor(term.source.info.mean, dtype=dtype, device=device)
        self.std = torch.tensor(term.source.info.std, dtype=dtype, device=device)
        self._pad = 0
        self._tables: dict[str, Tensor] = {}
        self._images = torch.empty(0)
        self._fed: Iterator[Tensor] = iter(())
        self._logits: Tensor | None = None
        self._known = 0  # rows of the bank whose logits are there

    @property
    def held(self) -> tuple[object, ...]:
        """What decides a captured step: where this reads from."""
        places = [(name, table.data_ptr()) for name, table in sorted(self._tables.items())]
        logits = None if self._logits is None else self._logits.data_ptr()
        return (self._images.data_ptr(), logits, self._pad, *places)

    def begin(self, drawn: StoringDraws) -> None:
        """Put a period's tables where the step reads them."""
        self.rows, self._pad = drawn.index.shape[1], drawn.pad
        if self.term.feed is not None:
            hold(self._tables, self.device, colours=drawn.colours)
            self.end()
            self._fed = self.term.feed.batches(drawn.index, drawn.crop, drawn.flip)
            return
        hold(
            self._tables, self.device, index=drawn.index, crop=drawn.crop, flip=drawn.flip,
            colours=drawn.colours,
        )  # fmt: skip
        bank = self.term.bank
        self._images = getattr(bank, "buffer", bank.images)
        plain = drawn.crop is None and drawn.flip is None and drawn.colours is None
        constant = getattr(self.term.loss, "constant", None)
        if plain and constant is not None and len(bank.images) <= drawn.index.numel():
            self._look(len(bank.images), constant)
        else:
            self._logits, self._known = None, 0

    @torch.no_grad()
    def _look(self, stored: int, constant: Callable[[Tensor], Tensor]) -> None:
        """The frozen model's logits of the rows that are new in the bank."""
        for start in range(self._known, stored, _CHUNK):
            stop = min(start + _CHUNK, stored)
            rows = torch.arange(start, stop, device=self._images.device)
            logits = constant(self._averaged(self._replayed(rows)))
            if self._logits is None or len(self._logits) < len(self._images):
                wider = logits.new_zeros(len(self._images), logits.shape[1])
                wider[: self._known] = 0 if self._logits is None else self._logits[: self._known]
                self._logits = wider
            self._logits[rows] = logits
            self._known = stop

    def fetch(self) -> None:
        """Before a step: take the next batch from the feed, if one makes them."""
        if self.term.feed is None:
            return
        batch = next(self._fed)
        if self._images.shape != batch.shape:
            self._images = torch.empty_like(batch)
        self._images.copy_(batch)

    def end(self) -> None:
        """After the last step: let go of the feed."""
        self._fed = iter(())

    def batch(self, at: Tensor) -> tuple[Tensor, ...]:
        """Step ``at``: images (N, 3, s, s), normalised; then the frozen logits if known."""
        row = {name: row_of(table, at) for name, table in self._tables.items()}
        if self.term.feed is not None:
            images = self._images
        else:
            images = self._replayed(row["index"], row.get("crop"), row.get("flip"))
        images = in_drawn_colours(self._averaged(images), row.get("colours"))
        if self._logits is None:
            return (images,)
        return images, self._logits.index_select(0, row["index"])

    def _replayed(
        self, index: Tensor, crop: Tensor | None = None, flip: Tensor | None = None
    ) -> Tensor:
        return bank_replay(
            self._images, index, crop=crop, flip=flip, pad=self._pad, mean=self.mean, std=self.std,
            dtype=self.mean.dtype, channels_last=True,
        )  # fmt: skip

    def _averaged(self, batch: Tensor) -> Tensor:
        if self.term.average_grey:
            return batch.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        return batch
