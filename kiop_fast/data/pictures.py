"""Image files without DALI: Pillow decodes, a few threads at a time, torch resizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kiop_fast.data.resize import resize


def read_picture(path: Path, channels: int) -> Tensor:
    """A file's pixels, (channels, h, w) uint8: grey repeated or colours weighed (ITU-R 601).

    Alpha is dropped, 16-bit grey is scaled to 8 bits, an EXIF turn is not applied: what DALI's
    decoder does as well.

    Raises:
        OSError, ValueError, SyntaxError: the file does not decode.
    """
    from PIL import Image

    with Image.open(path) as opened:
        picture: Image.Image = opened
        if opened.mode.startswith("I"):
            levels = np.asarray(opened, dtype=np.float64) / 257
            picture = Image.fromarray(np.rint(levels).astype(np.uint8))
        pixels = np.array(picture.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


class PictureDecoder:
    """Files to (n, C, s, s) uint8 by Pillow and :func:`resize`.

    Args:
        side: of the result, pixels; a picture of another shape is stretched.
        channels: 1 or 3.
        threads: files decoded at once (Pillow lets go of Python's lock while it decodes).
    """

    kind = "torch"

    def __init__(self, side: int, channels: int, threads: int = 1) -> None:
        self.side, self.channels, self.threads = side, channels, threads

    def decode(self, batches: Sequence[Sequence[Path]]) -> Iterator[Tensor]:
        """One result a batch of files.

        Raises:
            OSError, ValueError, SyntaxError: a file that does not decode.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            for paths in batches:
                yield torch.cat(list(pool.map(self._one, paths)))

    def _one(self, path: Path) -> Tensor:
        return resize(read_picture(path, self.channels)[None], self.side)
