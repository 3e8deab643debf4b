"""Image files of the tests of loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from picture_files import pictures
from PIL import Image

from kiop_fast.data import FileSplit


@pytest.fixture
def files(tmp_path: Path) -> FileSplit:
    """Twelve pictures of two sizes as JPEG, PNG and PPM."""
    paths = []
    for i, suffix in enumerate(["jpg", "png", "ppm"] * 4):
        pixels = pictures(i + 1, 30 + i % 2 * 17, 41, 3)[i]
        paths.append(tmp_path / f"{i:02d}.{suffix}")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return FileSplit(tuple(paths), torch.arange(12) % 3, 24, 3)
