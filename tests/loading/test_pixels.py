"""Batches by DALI and by torch, one operation at a time, against Pillow and torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loading_data import BOTH, DALI, INFO, TORCH, batch_of, gpu, waves
from picture_files import pictures
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from kiop_fast.config import LoadingConfig
from kiop_fast.data import FileSplit, Split, dali, open_feed, open_loader

pytest.importorskip("nvidia.dali")


@BOTH
def test_decoded_files_are_pillows_pixels(files: FileSplit, loading: LoadingConfig) -> None:
    """No resize: the first six files of one size, byte by byte."""
    chosen = FileSplit(files.paths[::2], files.labels[::2], 24, 3)
    native = [np.asarray(Image.open(path).convert("RGB")) for path in chosen.paths]
    squares = []
    for i, (path, pixels) in enumerate(zip(chosen.paths, native, strict=True)):
        if path.suffix == ".jpg":  # cannot be cut without encoding it again
            assert pixels.shape[:2] == (30, 41)
            continue
        squares.append((path.with_stem(f"square{i}"), pixels[:30, :30]))
        Image.fromarray(squares[-1][1]).save(squares[-1][0])
    square = FileSplit(tuple(p for p, _ in squares), torch.arange(len(squares)), 30, 3)
    expected = torch.from_numpy(np.stack([x for _, x in squares])).permute(0, 3, 1, 2)
    assert torch.equal(square.decoded(loading).images, expected)


@BOTH
def test_jpeg_pixels_are_pillows(tmp_path: Path, loading: LoadingConfig) -> None:
    Image.fromarray(pictures(1, 32, 32, 3)[0]).save(tmp_path / "x.jpg", quality=80)
    split = FileSplit((tmp_path / "x.jpg",), torch.tensor([0]), 32, 3)
    expected = np.asarray(Image.open(tmp_path / "x.jpg")).transpose(2, 0, 1)
    assert np.array_equal(split.decoded(loading).images[0].numpy(), expected)


@BOTH
@pytest.mark.parametrize("side", [11, 24, 64])
def test_resize_within_one_level_of_torchvision(
    files: FileSplit, loading: LoadingConfig, side: int
) -> None:
    """The outermost pixels apart: where the filter reaches beyond the picture, DALI repeats its
    edge and Pillow renormalises.  These pictures shrink by up to 3.7; there it makes 7 levels."""
    split = FileSplit(files.paths, files.labels, side, 3)
    for path, image in zip(split.paths, split.decoded(loading).images, strict=True):
        opened = Image.open(path).convert("RGB")
        resized = transforms.resize(opened, [side, side], InterpolationMode.BILINEAR)
        off = (image.int() - transforms.pil_to_tensor(resized).int()).abs()
        assert off[:, 1:-1, 1:-1].max() <= 1
        assert off.max() <= (8 if loading is DALI else 1)


@BOTH
def test_crop_flip_and_normalise_as_torchvision(loading: LoadingConfig) -> None:
    split = waves(6)
    crop = torch.tensor([[0, 0], [6, 6], [3, 3], [0, 6], [5, 1], [2, 4]])
    flip = torch.tensor([False, True, False, True, True, False])
    feed, _ = open_feed(split, INFO, batch=6, pad=3, loading=loading)
    made = batch_of(feed, [torch.arange(6)], [crop], [flip])
    for i, image in enumerate(split.images):
        seen = transforms.crop(transforms.pad(image, 3), *crop[i].tolist(), 24, 24)
        seen = transforms.hflip(seen) if flip[i] else seen
        expected = transforms.normalize(seen.float() / 255, list(INFO.mean), list(INFO.std))
        assert (made[i] - expected).abs().max() < 1e-5


@BOTH
def test_the_frame_of_a_crop_is_black_before_normalising(loading: LoadingConfig) -> None:
    white = Split(torch.full((1, 3, 24, 24), 255, dtype=torch.uint8), torch.tensor([0]))
    feed, _ = open_feed(white, INFO, batch=1, pad=3, loading=loading)
    made = batch_of(feed, [torch.tensor([0])], [torch.tensor([[0, 6]])], None)[0]
    for c in range(3):
        black, full = -INFO.mean[c] / INFO.std[c], (1 - INFO.mean[c]) / INFO.std[c]
        assert made[c, :3].sub(black).abs().max() < 1e-5
        assert made[c, :, -3:].sub(black).abs().max() < 1e-5
        assert made[c, 3:, :-3].sub(full).abs().max() < 1e-5


@BOTH
def test_grey_is_repeated_and_normalised_by_channel(loading: LoadingConfig) -> None:
    grey = waves(4, channels=1)
    feed, _ = open_feed(grey, INFO, batch=4, loading=loading)
    made = batch_of(feed, [torch.arange(4)])
    expected = (grey.images / 255 - torch.tensor(INFO.mean).view(3, 1, 1)) / torch.tensor(
        INFO.std
    ).view(3, 1, 1)
    assert (made - expected).abs().max() < 1e-5
    plain, _ = open_feed(grey, INFO, batch=4, normalise=False, loading=loading)
    assert (batch_of(plain, [torch.arange(4)]) - grey.images / 255).abs().max() < 1e-6


@BOTH
def test_files_read_anew_are_files_kept(files: FileSplit, loading: LoadingConfig) -> None:
    """memory_gb=0 decodes every batch again; the same batches come out."""
    from dataclasses import replace

    kept = open_loader(files, INFO, batch=5, last="keep", loading=loading)
    anew = open_loader(files, INFO, batch=5, last="keep", loading=replace(loading, memory_gb=0))
    for (x, y), (u, v) in zip(kept.epoch(2), anew.epoch(2), strict=True):
        assert (x - u).abs().max() < 1e-5
        assert torch.equal(y, v)


def test_both_loaders_show_the_same(files: FileSplit) -> None:
    for split in (waves(20), files):
        loaders = [open_loader(split, INFO, batch=8, last="keep", loading=k) for k in (DALI, TORCH)]
        assert [one.kind for one in loaders] == ["dali", "torch"]
        for (x, y), (u, v) in zip(loaders[0].epoch(1), loaders[1].epoch(1), strict=True):
            # Files: the resize's levels, eight at an edge and one elsewhere, over the smallest std.
            assert (x - u).abs().max() < (8.01 / 255 / 0.19 if split is files else 1e-5)
            assert (x - u).abs().mean() < 1.01 / 255 / 0.19
            assert torch.equal(y, v)


def test_files_are_decoded_by_dalis_operators(
    files: FileSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEG, PNG and PPM, with Pillow out of reach; and the pipeline says what is in it."""
    expected = files.decoded(TORCH).images.int()

    def no_pillow(*arguments: object, **options: object) -> None:
        raise AssertionError("Pillow was asked to read a file")

    monkeypatch.setattr(Image, "open", no_pillow)
    assert {path.suffix for path in files.paths} == {".jpg", ".png", ".ppm"}
    decoder = dali.DaliDecoder(24, 3, 12, device_id=None, threads=1)
    (made,) = decoder.decode([files.paths])
    assert (made.int() - expected).abs()[..., 1:-1, 1:-1].max() <= 1
    text = decoder.runner.pipeline.serialize()
    for operator in (b"io__file__Read", b"decoders__Image", b"Resize"):
        assert operator in text
    with pytest.raises(AssertionError, match="Pillow"):
        FileSplit(files.paths, files.labels, 24, 3).decoded(TORCH)


@pytest.mark.gpu
@gpu
def test_batches_on_the_gpu_are_those_of_the_cpu(files: FileSplit) -> None:
    """From memory: equal to rounding.  From files: PNG and PPM decode alike; JPEG on the GPU has a
    decoder of its own, with other rounding of colours and chroma."""
    split = waves(20)
    for memory in (4.0, 0.0):
        loading = LoadingConfig(loader="dali", threads=2, memory_gb=memory)
        for given, allowed in ((split, 1e-5), (files, 12 / 255 / 0.19)):
            here = open_loader(given, INFO, batch=4, last="keep", loading=loading)
            there = open_loader(given, INFO, batch=4, last="keep", loading=loading, device="cuda")
            for epoch in range(2):
                for (x, y), (u, v) in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
                    assert u.is_cuda
                    assert v.is_cuda
                    assert (x - u.cpu()).abs().max() < allowed
                    assert torch.equal(y, v.cpu())
