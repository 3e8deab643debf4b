"""Image files → class and probability, for every task of a served prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kiop_fast.data.pictures import read_picture
from kiop_fast.errors import DataError
from kiop_fast.prompt.served import PromptedTask, ServedPrompt


@dataclass(frozen=True)
class Prediction:
    """What one task says about one file.

    Attributes:
        file: the image.
        task: name of the task.
        best: (class name, probability), most probable first.
    """

    file: Path
    task: str
    best: tuple[tuple[str, float], ...]


def read_image(path: str | Path, side: int, channels: int, *, invert: bool = False) -> Tensor:
    """An image file as (channels, side, side) uint8, resized (bilinear), grey or RGB.

    Args:
        invert: swap dark and light, e.g. for ink on paper where the task knows light on dark.

    Raises:
        DataError: the file is missing or no readable image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        read = read_picture(Path(path), channels).permute(1, 2, 0).numpy()
        picture = Image.fromarray(read if channels == 3 else read[..., 0])
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise DataError("an image cannot be read", got=f"{path}: {error}",
                        expected="a PNG, JPEG or other picture file",
                        fix="check the path and the file") from None  # fmt: skip
    pixels = torch.from_numpy(np.array(picture)).view(side, side, channels).permute(2, 0, 1)
    return (255 - pixels if invert else pixels).contiguous()


@torch.no_grad()
def predict(
    served: ServedPrompt,
    files: Sequence[str | Path],
    *,
    task: str | None = None,
    top: int = 3,
    invert: bool = False,
    batch: int = 64,
) -> list[Prediction]:
    """Classify image files, by one task or by each.

    Every file is read before anything is computed, so one bad file is one early error.

    Raises:
        DataError: a file that is no readable image.
        ArtefactError: unknown task.
    """
    modules = [served.task(name) for name in ([task] if task else served.names)]
    kinds = {module.info.channels for module in modules}
    side = served.prompt.side
    pictures = {
        kind: torch.stack([read_image(file, side, kind, invert=invert) for file in files])
        for kind in kinds
    }
    return [
        Prediction(Path(file), module.name, best)
        for module in modules
        for file, best in zip(
            files, _ranked(module, pictures[module.info.channels], top, batch), strict=True
        )
    ]


def _ranked(
    module: PromptedTask, images: Tensor, top: int, batch: int
) -> list[tuple[tuple[str, float], ...]]:
    device = next(module.model.parameters()).device
    logits = torch.cat([module(part.to(device)) for part in images.split(batch)])
    values, classes = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return [
        tuple((module.classes[c], p) for c, p in zip(row, chances, strict=True))
        for row, chances in zip(classes.tolist(), values.tolist(), strict=True)
    ]
