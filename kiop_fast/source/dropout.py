"""Dropout that stays on in a frozen model, with masks from named draws.

The authors' code never puts model A in eval mode, so the dropout of a VGG stays active (SPEC
section 9).  Preset ``upstream`` does the same; randomness is still data: mask ``i`` of a layer
comes from the stream ``(seed, epoch, task, "dropout/{role}/{layer}/{i}")``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kiop_fast.runtime import draws


class DropoutDraws:
    """The masks of one period of one task.

    Args:
        seed, epoch, task: the first parts of their names.
    """

    def __init__(self, seed: int, epoch: int, task: str) -> None:
        self.seed, self.epoch, self.task = seed, epoch, task
        self._calls: Counter[str] = Counter()

    @contextmanager
    def active(self, model: nn.Module, role: str) -> Iterator[None]:
        """Inside, every Dropout layer of ``model`` drops, whatever mode the model is in.

        Args:
            role: keeps the forward passes of one step apart, e.g. ``plain`` and ``prompted``.
        """
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
        for name, layer in layers.items():
            layer.forward = self._drop(f"{role}/{name}", layer.p)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.forward

    def _drop(self, name: str, p: float) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            call = self._calls[name]
            self._calls[name] += 1
            rng = draws.generator(self.seed, self.epoch, self.task, f"dropout/{name}/{call}")
            keep = torch.from_numpy(rng.random(tuple(x.shape)) >= p)
            return x * keep.to(x) / (1.0 - p)

        return forward
