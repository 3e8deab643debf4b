"""Built-in task ``letters``: 26 printed capitals in the fonts that matplotlib ships."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from kiop_fast.data.drawing import Look, Masks, draw, fill
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.errors import DataError
from kiop_fast.runtime import draws

CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10", "cmmi10",
)  # fmt: skip
TRAIN_PER_CLASS = 300
TEST_PER_CLASS = 40
LOOK = Look(rotation=8.0, scale=(0.85, 1.1), shift=0.05, noise=0.05, chalk=True)

INFO = DatasetInfo("letters", side=32, channels=3, classes=tuple(CAPITALS))


@lru_cache(maxsize=1)
def glyph_masks() -> Masks:
    """Coverage of every capital in every font, (21, 26, 128, 128) uint8.

    Glyph outlines are filled here, so the pictures depend on the font files alone and not on a
    version of FreeType.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import text_to_path

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = []
    for font in FONTS:
        file = folder / f"{font}.ttf"
        if not file.exists():
            raise DataError("a font of matplotlib is missing", got=file,
                            expected="the fonts that the matplotlib wheel ships",
                            fix="install matplotlib again with pip")  # fmt: skip
        face = FontProperties(fname=str(file))
        for letter in CAPITALS:
            points, codes = text_to_path.get_text_path(face, letter)
            polygons = Outline(points, codes).to_polygons()
            masks.append(fill([np.asarray(polygon, np.float64) for polygon in polygons]))
    return np.stack(masks).reshape(len(FONTS), len(CAPITALS), *masks[0].shape)


@lru_cache(maxsize=4)
def _read(split: str, side: int) -> Split:
    per_class = TRAIN_PER_CLASS if split == "train" else TEST_PER_CLASS
    return draw(glyph_masks(), per_class, side, draws.generator(0, 0, "letters", split), LOOK)


def train(side: int) -> Split:
    """The 7,800 training pictures at ``side``, drawn once a process."""
    return _read("train", side)


def test(side: int) -> Split:
    """The 1,040 test pictures at ``side``, drawn once a process."""
    return _read("test", side)


LETTERS = Dataset(INFO, train, test)
