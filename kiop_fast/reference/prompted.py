"""A frozen model seen through a prompt that is kept as full squares, as upstream keeps it."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kiop_fast.prompt import Prompt, PromptedModel


def pad_through(prompt: Prompt, images: Tensor, depth: int) -> Tensor:
    """(N, C, s, s) → (N, C, S_depth, S_depth): a ring at a time, pad and add a masked square.

    The ring's cells are scattered into a square of zeros on the way, so that gradients reach
    them; inside the square the mask is 0.
    """
    inner = prompt.side
    for outer, cells in zip(prompt.rings[:depth], prompt.cells, strict=False):
        frame = _frame(inner, outer)
        mask, border = _mask(inner, outer, images.dtype, images.device)
        square = cells.new_zeros(len(cells), outer * outer).index_copy(1, border, cells)
        images = F.pad(images, frame) + torch.sigmoid(square.view(-1, outer, outer)) * mask
        inner = outer
    return images


def _frame(inner: int, outer: int) -> tuple[int, int, int, int]:
    """Padding left, right, top, bottom: the odd pixel goes to the left and the top."""
    before, after = (outer - inner + 1) // 2, (outer - inner) // 2
    return before, after, before, after


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # later callers may want gradients
def _mask(
    inner: int, outer: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """1 on the border of the (S, S) square and 0 inside; flat positions of the border."""
    mask = F.pad(torch.zeros(inner, inner), _frame(inner, outer), value=1.0)
    return mask.to(device, dtype), mask.flatten().nonzero().flatten().to(device)


class ReferencePromptedModel(PromptedModel):
    """:class:`~kiop_fast.prompt.PromptedModel` without a kernel; the same arguments."""

    def seen(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) → the canvas that A sees, (N, 3, S_depth, S_depth)."""
        return pad_through(self.prompt, images, self.depth)

    worn = seen
