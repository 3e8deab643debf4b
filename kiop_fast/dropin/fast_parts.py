"""The authors' small parts with our operations inside: KL divergence and visual prompt.

Methods are exchanged on their classes, so constructors, attributes and state dicts are the same;
where a call is of no kind that we know, the original runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kiop_fast.dropin.checkpoint import mask as ring_mask
from kiop_fast.kernels import border_index, mapped_kl, prompt_pad


def fast_kldiv(original: Callable[..., Tensor], count: Counter[str]) -> Callable[..., Tensor]:
    """``kldiv(logits, targets, T, reduction)`` in one pass over both."""

    def kldiv(
        logits: Tensor, targets: Tensor, T: float = 1.0, reduction: str = "batchmean"
    ) -> Tensor:
        known = logits.ndim == 2 and logits.shape == targets.shape and len(logits) > 0
        if not known or reduction not in ("batchmean", "sum"):
            return original(logits, targets, T=T, reduction=reduction)
        count["kldiv"] += 1
        loss = mapped_kl(logits, targets, None, float(T)).loss.to(logits.dtype)
        return loss * len(logits) if reduction == "sum" else loss

    return kldiv


def fast_prompt(kind: Any, count: Counter[str]) -> dict[str, Any]:
    """Methods for ``ExpansiveVisualPrompt``: pads and adds its border in one operation."""
    plain_forward = kind.forward

    def ring_of(self: Any) -> int:
        """Side of what the border surrounds; 0 where the original must do it.

        That is a mask with holes, or no border at all.
        """
        found: int | None = self.__dict__.get("_ring")
        if found is None:
            inner = self.out_size - self.l_pad - self.r_pad
            plain = ring_mask(inner, self.out_size)
            usual = inner < self.out_size and torch.equal(plain, self.mask.cpu())
            found = self.__dict__["_ring"] = inner if usual else 0
        return found

    def forward(self: Any, x: Tensor) -> Tensor:
        inner, program = ring_of(self), self.program
        square = x.ndim == 4 and tuple(x.shape[1:]) == (3, inner, inner)
        if not inner or not square or x.dtype != program.dtype:
            original: Tensor = plain_forward(self, x)
            return original
        count["ExpansiveVisualPrompt"] += 1
        places = self.__dict__.setdefault("_places", {})
        if program.device not in places:
            places[program.device] = border_index(inner, self.out_size).to(program.device)
        cells = program.flatten(1).index_select(1, places[program.device])
        seen = prompt_pad(x, [cells], [self.out_size])
        return seen if self.normalize is None else self.normalize(seen)

    return {"forward": forward}
