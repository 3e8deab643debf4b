"""The prompt: concentric square rings of learnable cells around an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kiop_fast.errors import PromptError
from kiop_fast.kernels import border_index, prompt_pad


class Prompt(nn.Module):
    """Visual prompt of any number of nested rings (paper section 4.1; SPEC section 2).

    Ring k takes a canvas of side S_{k-1} (the image for k = 1) to side S_k: zero padding with
    ``left = top = (S_k - S_{k-1} + 1) // 2`` and ``sigmoid(cells)`` on the border.  Only border
    cells exist; cells start at 0, a flat 0.5.  It is applied after normalisation.

    Args:
        side: image side, pixels.
        rings: side of the canvas after each ring, increasing.
        channels: image channels.

    Attributes:
        cells: one (channels, S_k² - S_{k-1}²) parameter a ring, row-major over the border.

    Raises:
        PromptError: the rings do not nest around the image.
    """

    def __init__(self, side: int, rings: Sequence[int], channels: int = 3) -> None:
        super().__init__()
        self.side, self.rings, self.channels = side, tuple(rings), channels
        sides = [side, *self.rings]
        if not self.rings or any(a >= b for a, b in pairwise(sides)):
            raise PromptError(
                "rings must nest around the image",
                got=f"image side {side}, rings {list(rings)}",
                expected="increasing ring sides, all larger than the image",
                fix=f"for example rings [{side + 4}, {4 * side}]",
            )
        self.cells = nn.ParameterList(
            torch.zeros(channels, outer * outer - inner * inner) for inner, outer in pairwise(sides)
        )

    def canvas_side(self, depth: int) -> int:
        """Side of the canvas after ``depth`` rings, pixels."""
        return self.rings[depth - 1]

    def forward(self, images: Tensor, depth: int | None = None) -> Tensor:
        """(N, C, s, s) normalised → (N, C, S_depth, S_depth), seen through ``depth`` rings."""
        depth = len(self.rings) if depth is None else depth
        if not 1 <= depth <= len(self.rings):
            raise PromptError("no such depth", got=depth, expected=f"1 … {len(self.rings)} rings")
        last = images.is_contiguous(memory_format=torch.channels_last)
        return prompt_pad(images, list(self.cells)[:depth], self.rings[:depth], channels_last=last)

    def corner(self, depth: int) -> int:
        """First row and column of the image in the canvas of ``depth`` rings, pixels."""
        return sum((b - a + 1) // 2 for a, b in pairwise((self.side, *self.rings[:depth])))

    def border(self, depth: int) -> Tensor:
        """The rings alone, (1, C, S_depth, S_depth), differentiable; 0 where the image goes."""
        blank = self.cells[0].new_zeros(1, self.channels, self.side, self.side)
        return self(blank, depth)

    @torch.no_grad()
    def picture(self, depth: int | None = None) -> Tensor:
        """The border as an image in [0, 1], (C, S, S); black where the image goes."""
        return self.border(len(self.rings) if depth is None else depth)[0]

    def squares(self) -> list[Tensor]:
        """Each ring as the full square (C, S_k, S_k) that upstream stores; zeros inside."""
        full = []
        for inner, outer, cells in zip(
            (self.side, *self.rings), self.rings, self.cells, strict=False
        ):
            square = cells.new_zeros(self.channels, outer * outer)
            square[:, border_index(inner, outer)] = cells.detach()
            full.append(square.view(self.channels, outer, outer))
        return full
