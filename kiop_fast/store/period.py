"""One knowledge storing period: the prompt learns from the banks (paper section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kiop_fast.config import StoringConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.kernels import bank_replay
from kiop_fast.runtime import draws
from kiop_fast.store.terms import Term


@dataclass(frozen=True)
class StoringDraws:
    """Batch indices, crops, flips and colour orders of one period and bank.

    Attributes:
        index: (steps, N) int64 into the bank.
        pad: zero padding the crops refer to, pixels.
        crop: (steps, N, 2) int64 top and left in the padded frame, or None.
        flip: (steps, N) bool, or None.
        colours: (steps, N, 3) int64 orders of the normalised channels, or None.
    """

    index: Tensor
    pad: int
    crop: Tensor | None
    flip: Tensor | None
    colours: Tensor | None = None


def augmentation(config: StoringConfig, info: DatasetInfo) -> tuple[int, float]:
    """Padding of the random crop, pixels, and probability of a flip."""
    return (info.pad, info.flip) if config.augment_as_dataset else (config.pad, config.flip)


def draw_storing(
    config: StoringConfig, info: DatasetInfo, population: int, batch: int, *,
    seed: int, epoch: int, task: str,
) -> StoringDraws:  # fmt: skip
    """Draw the batches of one bank for one period, from ``(seed, epoch, task, purpose)``."""
    pad, flip = augmentation(config, info)
    shape = (config.steps, batch)
    augment = draws.generator(seed, epoch, task, "bank augmentation")
    return StoringDraws(
        index=draws.permutation_batches(
            draws.generator(seed, epoch, task, "bank batches"), *shape, population
        ),
        pad=pad,
        crop=draws.crop_offsets(augment, shape, pad) if pad else None,
        flip=draws.flips(augment, shape, flip) if flip else None,
        colours=(
            draws.channel_orders(draws.generator(seed, epoch, task, "bank colours"), shape)
            if config.shuffle_colours and info.channels == 3
            else None
        ),
    )


def in_drawn_colours(batch: Tensor, orders: Tensor | None) -> Tensor:
    """(N, 3, s, s) with each image's channels in its drawn order, (N, 3)."""
    if orders is None:
        return batch
    rows = torch.arange(len(batch), device=batch.device)[:, None]
    return batch[rows, orders.to(batch.device)]


def learning_rate(config: StoringConfig, epoch: int, epochs: int) -> float:
    """Cosine over the epochs, constant within one."""
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def store(
    terms: Sequence[Term],
    drawn: Mapping[str, StoringDraws],
    optimizer: torch.optim.Optimizer,
    steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """One period; the optimizer's parameters (the ring cells) move, nothing else does.

    Args:
        terms: the summands of the transfer loss.
        drawn: each term's batches, by its name.
        optimizer: SGD over what is trained.
        steps: prompt steps.
        on_step: called with the number of finished steps and the total loss (a tensor).

    Returns:
        (steps, 2 · len(terms)): each term's unweighted loss, then each term's share of rows
        whose arg-max agrees.
    """
    banks = {term.name: _Replay(term, drawn[term.name]) for term in terms}
    log = []
    for step in range(steps):
        results = [term.loss(banks[term.name].batch(step)) for term in terms]
        total = torch.stack(
            [term.weight * r.loss for term, r in zip(terms, results, strict=True)]
        ).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rows = [drawn[term.name].index.shape[1] for term in terms]
        log.append(torch.stack(
            [r.loss.detach() for r in results]
            + [r.agreement / n for r, n in zip(results, rows, strict=True)]
        ))  # fmt: skip
        if on_step is not None:
            on_step(step + 1, total.detach())
    return torch.stack(log).cpu()


class _Replay:
    """A bank's batches, normalised, by step."""

    def __init__(self, term: Term, drawn: StoringDraws) -> None:
        self.term, self.drawn = term, drawn
        if term.feed is not None:
            self.fed = term.feed.batches(drawn.index, drawn.crop, drawn.flip)
            return
        self.images = term.bank.images
        self.mean = torch.tensor(term.source.info.mean, device=self.images.device)
        self.std = torch.tensor(term.source.info.std, device=self.images.device)

    def batch(self, step: int) -> Tensor:
        """Batch ``step``; steps are asked for in order."""
        drawn = self.drawn
        batch = next(self.fed) if self.term.feed is not None else self._replayed(step)
        if self.term.average_grey:
            batch = batch.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        return in_drawn_colours(batch, None if drawn.colours is None else drawn.colours[step])

    def _replayed(self, step: int) -> Tensor:
        drawn = self.drawn
        return bank_replay(
            self.images,
            drawn.index[step],
            crop=None if drawn.crop is None else drawn.crop[step],
            flip=None if drawn.flip is None else drawn.flip[step],
            pad=drawn.pad,
            mean=self.mean,
            std=self.std,
            dtype=self.mean.dtype,
        )
