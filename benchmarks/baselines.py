"""``tuned``: the reference as a careful user would tune it without touching its mathematics.

Both banks on the device instead of PNG files and host memory; TF32 products on a GPU.  Its banks
and its storing loop also serve ``compiled.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kiop_fast import reference
from kiop_fast.engine import Engine
from kiop_fast.kernels import bank_replay_eager
from kiop_fast.reference.synthesizing import Synthesizer as ReferenceSynthesizer
from kiop_fast.store import StoringDraws, Term


class DeviceImages:
    """All images of a task on the device."""

    def __init__(
        self, channels: int, side: int, device: torch.device, folder: Any = None, capacity: int = 0
    ) -> None:
        self.images = torch.empty(0, channels, side, side, dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, images: Tensor, targets: Tensor) -> None:
        self.images = torch.cat([self.images, images.to(self.images.device)])


class DeviceFeatures:
    """A ring of feature pairs on the device."""

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(capacity, 2 * width, device=device)
        self.added = 0

    @property
    def stored(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, features: Tensor) -> None:
        position = (self.added + torch.arange(len(features))) % len(self.rows)
        self.rows[position.to(self.rows.device)] = features.to(self.rows)
        self.added += len(features)

    def pairs(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        chosen = (
            self.rows[: self.stored] if index is None else self.rows[index.to(self.rows.device)]
        )
        local, global_ = chosen.chunk(2, dim=1)
        return local, global_


def replayed(term: Term, drawn: StoringDraws, step: int, replay: Callable[..., Tensor]) -> Tensor:
    """A storing batch out of a device bank, crops and flips as drawn, normalised."""
    images, info = term.bank.images, term.source.info
    like: dict[str, Any] = {"dtype": torch.float32, "device": images.device}
    on_device = [
        None if table is None else table[step].to(images.device, non_blocking=True)
        for table in (drawn.index, drawn.crop, drawn.flip)
    ]
    index, crop, flip = on_device
    return replay(
        images, index, crop=crop, flip=flip, pad=drawn.pad,
        mean=torch.tensor(info.mean, **like), std=torch.tensor(info.std, **like),
    )  # fmt: skip


def storing_with(replay: Callable[..., Tensor]) -> Callable[..., Any]:
    """The storing periods of a run, which read device banks through ``replay``."""

    class Storing:
        def __init__(
            self, terms: Sequence[Term], optimizer: torch.optim.Optimizer, steps: int
        ) -> None:
            self.terms, self.optimizer, self.steps = terms, optimizer, steps

        def run(self, drawn: Mapping[str, StoringDraws], on_step: Any = None) -> Tensor:
            return torch.stack([self._step(drawn, step) for step in range(self.steps)]).cpu()

        def _step(self, drawn: Mapping[str, StoringDraws], step: int) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            results = [
                term.loss(replayed(term, drawn[term.name], step, replay)) for term in self.terms
            ]
            weighted = [term.weight * r.loss for term, r in zip(self.terms, results, strict=True)]
            self.optimizer.zero_grad()
            torch.stack(weighted).sum().backward()
            self.optimizer.step()
            rows = [drawn[term.name].index.shape[1] for term in self.terms]
            shares = [r.agreement / n for r, n in zip(results, rows, strict=True)]
            return torch.stack([*(r.loss.detach() for r in results), *shares])

    return Storing


class TunedSynthesizer(ReferenceSynthesizer):
    """The reference with its feature bank on the device."""

    def __init__(self, *args: Any, bank_rows: int, device: torch.device, **more: Any) -> None:
        super().__init__(*args, bank_rows=1, device=device, **more)
        self.features = DeviceFeatures(bank_rows, self.features.rows.shape[1] // 2, device)  # type: ignore[assignment]


def one_period(storing: Callable[..., Any]) -> Callable[..., Tensor]:
    """``store`` of an engine from its ``storing``."""

    def store(terms: Any, drawn: Any, optimizer: Any, steps: int, on_step: Any = None) -> Tensor:
        log: Tensor = storing(terms, optimizer, steps).run(drawn, on_step)
        return log

    return store


def tuned() -> Engine:
    """The reference with banks on the device; its TF32 is switched on around a run."""
    storing = storing_with(bank_replay_eager)
    return Engine(
        "tuned", DeviceImages, TunedSynthesizer, reference.ReferencePromptedModel,
        reference.core_loss, reference.provider_loss, reference.vanilla_loss, one_period(storing),
        storing,
    )  # fmt: skip
