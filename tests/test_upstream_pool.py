"""The patched image pool: its files, and the batches that the script's transform would make."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T
from upstream_checkout import importable, synthesizer, write_checkout

from kiop_fast import accelerate_upstream
from kiop_fast.dropin.fast_pool import Batches
from kiop_fast.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from importable(tmp_path, monkeypatch)


def test_the_pool(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    utils = importlib.import_module("datafree.utils")
    pool = utils.ImagePool("run/x")
    images = torch.rand(3, 3, 8, 8)
    pool.add(images, 3)
    utils.ImagePool("run/grey").add(images, 1)
    bytes_ = (images.numpy() * 255).astype("uint8")
    assert np.array_equal(np.array(Image.open("run/x/0-2.png")).transpose(2, 0, 1), bytes_[2])
    assert Image.open("run/grey/0-0.png").mode == "L"
    other = utils.ImagePool("run/y")
    assert len(other.get_dataset()) == 0
    with pytest.raises(ConfigError, match="share one folder"):
        utils.ImagePool("run/y")
    (checkout / "old").mkdir()
    Image.new("L", (4, 4)).save(checkout / "old" / "0-0.png")
    with pytest.raises(ConfigError, match="not empty"):
        utils.ImagePool(str(checkout / "old"))


TRANSFORMS = {
    "cifar": T.Compose([T.RandomCrop(8, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                        T.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]),
    "gtsrb": T.Compose([T.Resize((8, 8)), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]),
    "mnist": T.Compose([T.ToTensor(), T.Resize((8, 8)), T.Lambda(lambda x: x.repeat(3, 1, 1))]),
    "plain": T.ToTensor(),
    "unknown": T.Compose([T.GaussianBlur(3, sigma=1.0), T.ToTensor()]),
    "no batch": T.Compose([T.ToTensor(), T.Lambda(lambda x: x if float(x[0, 0, 0]) >= 0 else -x)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_batches_are_what_the_transform_makes(name: str) -> None:
    """Those without chance, picture by picture; cifar's by its crops' and flips' outcomes."""
    transform = TRANSFORMS[name]
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    given = T.Compose([transform]) if name == "plain" else transform
    batches = Batches(pixels, given, 2, torch.device("cpu"), order=torch.arange)
    assert (batches.plan is None) == (name in ("unknown", "no batch"))
    got = [batches.next() for _ in range(4)]
    assert [len(b) for b in got] == [2, 2, 1, 2]
    if name == "cifar":
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        frame = nn.functional.pad(pixels[0].float() / 255, (4, 4, 4, 4))
        crops = [frame[:, t : t + 8, x : x + 8] for t in range(9) for x in range(9)]
        possible = [(w - mean) / std for crop in crops for w in (crop, crop.flip(2))]
        assert min(float((got[0][0] - p).abs().max()) for p in possible) < 1e-5
        return
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    wanted = torch.stack([transform(picture) for picture in pictures])
    torch.testing.assert_close(torch.cat(got[:3]), wanted, rtol=1e-5, atol=1e-6)


def test_images_given_join_the_batches(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    (checkout / "given").mkdir()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(checkout / "given" / "w.png")
    one = synthesizer(importlib.import_module("datafree.synthesis"), cn=3,
                      init_dataset=str(checkout / "given"), sample_batch_size=7)  # fmt: skip
    one.synthesize()
    batch = one.sample()
    white = (1 - 0.4) / 0.3
    assert len(batch) == 7
    assert sum(bool(((image - white).abs() < 1e-5).all()) for image in batch) >= 1
