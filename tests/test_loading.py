"""Batches by DALI and by torch: pixels against torchvision, epochs, shards, seeds, failures."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import pictures
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from kiop_fast.config import LoadingConfig
from kiop_fast.data import DatasetInfo, FileBank, FileSplit, Split, dali, open_feed, open_loader
from kiop_fast.data.files import undecodable
from kiop_fast.data.loader import uses_dali
from kiop_fast.errors import DataError

pytest.importorskip("nvidia.dali")

INFO = DatasetInfo(
    "waves", 24, 3, ("a", "b", "c"), (0.49, 0.48, 0.45), (0.20, 0.19, 0.21), pad=3, flip=0.5
)
DALI, TORCH = LoadingConfig(loader="dali", threads=1), LoadingConfig(loader="torch", threads=1)
BOTH = pytest.mark.parametrize("loading", [DALI, TORCH], ids=["dali", "torch"])


def waves(count: int, side: int = 24, channels: int = 3) -> Split:
    made = torch.from_numpy(pictures(count, side, side, channels)).permute(0, 3, 1, 2)
    return Split(made.contiguous(), torch.arange(count) % 3)


@pytest.fixture
def files(tmp_path: Path) -> FileSplit:
    """Twelve pictures of two sizes as JPEG, PNG and PPM."""
    paths = []
    for i, suffix in enumerate(["jpg", "png", "ppm"] * 4):
        pixels = pictures(i + 1, 30 + i % 2 * 17, 41, 3)[i]
        paths.append(tmp_path / f"{i:02d}.{suffix}")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return FileSplit(tuple(paths), torch.arange(12) % 3, 24, 3)


def batch_of(feed: object, *tables: list[torch.Tensor] | None) -> torch.Tensor:
    (made,) = list(feed.batches(*tables))  # type: ignore[attr-defined]
    return made


# --- pixels, one operation at a time -------------------------------------------------------------


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


# --- epochs --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("count", "batch", "last", "sizes"),
    [
        (20, 8, "keep", [8, 8, 4]),
        (20, 8, "drop", [8, 8]),
        (16, 8, "keep", [8, 8]),
        (3, 8, "keep", [3]),  # fewer batches than DALI prepares ahead
        (1, 1, "drop", [1]),
    ],
)
def test_epoch_sizes(
    loading: LoadingConfig, count: int, batch: int, last: str, sizes: list[int]
) -> None:
    loader = open_loader(waves(count), INFO, batch=batch, last=last, loading=loading)
    for epoch in range(3):
        assert [len(x) for x, _ in loader.epoch(epoch)] == sizes
    assert (len(loader), loader.size) == (len(sizes), sum(sizes))


@BOTH
def test_a_test_loader_shows_all_in_order(loading: LoadingConfig) -> None:
    split = waves(10)
    loader = open_loader(split, INFO, batch=4, training=False, normalise=False, loading=loading)
    images, labels = zip(*loader.epoch(), strict=True)
    assert (torch.cat(images) - split.images / 255).abs().max() < 1e-6
    assert torch.equal(torch.cat(labels), split.labels)


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_shards_share_an_epoch(shards: int) -> None:
    split = Split(waves(11).images, torch.arange(11))
    seen = []
    for i in range(shards):
        loader = open_loader(split, INFO, batch=2, last="keep", shard=(i, shards), loading=DALI)
        mine = torch.cat([labels for _, labels in loader.epoch(5)]).tolist()
        assert len(mine) == loader.size in (11 // shards, -(-11 // shards))
        seen += mine
    assert sorted(seen) == list(range(11))


@BOTH
def test_seed_and_epoch_decide_the_order(loading: LoadingConfig) -> None:
    def one(seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        loader = open_loader(waves(12), INFO, batch=12, seed=seed, loading=loading)
        ((images, labels),) = loader.epoch(epoch)
        return images, labels

    first, again = one(1, 3), one(1, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], one(2, 3)[0])
    assert not torch.equal(first[0], one(1, 4)[0])


def test_one_pipeline_for_all_epochs_and_batches_that_stay(files: FileSplit) -> None:
    """Batches kept over three epochs still hold what they held: DALI reuses no buffer of theirs."""
    for split in (waves(20), FileSplit(files.paths, files.labels, 24, 3)):
        loading = LoadingConfig(loader="dali", threads=1, memory_gb=0)
        loader = open_loader(split, INFO, batch=4, loading=loading)
        runner = getattr(loader.feed, "feed", loader.feed).runner
        pipeline = weakref.ref(runner.pipeline)
        kept = [x for epoch in range(3) for x, _ in loader.epoch(epoch)]
        copies = [x.clone() for epoch in range(3) for x, _ in loader.epoch(epoch)]
        assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))
        assert runner.pipeline is pipeline()


def test_the_hand_over_copies_nothing() -> None:
    """DALI's own buffer is where the tensor's data lies."""
    runner = dali.DaliFeed(
        lambda rows: waves(4).images[rows], side=24, channels=3, batch=4, normaliser=None,
        device=torch.device("cpu"),
    ).runner  # fmt: skip
    places = []
    take = runner.pipeline.share_outputs

    def watched(stream: object = None) -> tuple[object, ...]:
        made = take(stream)
        places.append(made[0].data_ptr() if hasattr(made[0], "data_ptr") else None)
        places[-1] = places[-1] or made[0].as_tensor().data_ptr()
        return made

    runner.pipeline.share_outputs = watched
    inputs = {"images": waves(4).images.numpy(), "flip": np.zeros(4, np.int32)}
    made = list(runner.run([inputs]))
    assert [x.data_ptr() for x in made] == places


def test_a_loop_left_early_leaves_nothing_behind() -> None:
    loader = open_loader(waves(20), INFO, batch=4, loading=DALI)
    first = [x.clone() for x, _ in loader.epoch(0)]
    for epoch in (0, 0):
        for x, _ in loader.epoch(epoch):
            assert torch.equal(x, first[0])
            break
    assert all(torch.equal(x, y) for (x, _), y in zip(loader.epoch(0), first, strict=True))
    running = loader.epoch(0)
    next(running)
    with pytest.raises(DataError, match="two loops"):
        next(loader.epoch(1))
    running.close()
    assert len(list(loader.epoch(1))) == 5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_twenty_epochs(files: FileSplit) -> None:
    """Resident pages after epochs 4 to 20 through one pipeline differ by less than a batch kept
    per epoch would make: 20 epochs of 1,024 images of 12 KB are 240 MB, 5 MB are allowed."""
    split = waves(1024, side=32)
    loader = open_loader(split, INFO, batch=64, loading=DALI)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    after = []
    for epoch in range(20):
        for images, _ in loader.epoch(epoch):
            assert len(images) == 64
        after.append(resident())
    assert max(after[4:]) - after[3] < 5


# --- failures ------------------------------------------------------------------------------------


@BOTH
def test_a_file_that_breaks_later_is_named(files: FileSplit, loading: LoadingConfig) -> None:
    from dataclasses import replace

    loader = open_loader(files, INFO, batch=4, loading=replace(loading, memory_gb=0))
    assert len(list(loader.epoch(0))) == 3
    whole = files.paths[7].read_bytes()
    files.paths[7].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1 image file does not decode(.|\n)*07\.png"):
        list(loader.epoch(0))
    files.paths[7].write_bytes(whole)
    assert len(list(loader.epoch(1))) == 3  # the loader goes on
    files.paths[7].unlink()
    skip = replace(loading, memory_gb=0, undecodable="skip")
    with pytest.warns(UserWarning, match=r"skipped 1 image files .*07\.png"):
        rest = open_loader(files, INFO, batch=4, last="keep", loading=skip)
    assert rest.size == 11
    assert sum(len(x) for x, _ in rest.epoch(0)) == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="here DALI can start on a GPU")
def test_files_are_not_blamed_where_dali_cannot_start(files: FileSplit) -> None:
    decoder = dali.DaliDecoder(24, 3, 12, device_id=0, threads=1)
    with pytest.raises(DataError, match="DALI cannot start") as error:
        undecodable(decoder, list(files.paths))
    assert "loader=torch" in str(error.value)
    assert re.search(r"got: .*CUDA", str(error.value))


def test_bank_of_files_reads_only_what_is_asked(files: FileSplit) -> None:
    bank = FileBank(files, TORCH)
    everything = files.decoded(TORCH).images
    assert torch.equal(bank.spread(4), everything[[0, 3, 6, 9]])
    assert torch.equal(bank.spread(100), everything)
    assert len(bank) == 12


def test_arguments_that_are_refused() -> None:
    with pytest.raises(DataError, match="no batch"):
        open_loader(waves(3), INFO, batch=4, loading=TORCH)
    for wrong in ({"last": "repeat"}, {"shard": (2, 2)}, {"shard": (-1, 2)}):
        with pytest.raises(DataError, match="last batch or shard"):
            open_loader(waves(3), INFO, batch=2, loading=TORCH, **wrong)  # type: ignore[arg-type]


def test_auto_takes_dali_for_what_lies_on_disk(files: FileSplit) -> None:
    auto, cifar = LoadingConfig(), DatasetInfo("cifar10", 32, 3, ("a",))
    assert uses_dali(auto, cifar, waves(1))
    assert uses_dali(auto, INFO, files)
    assert not uses_dali(auto, INFO, waves(1))
    assert uses_dali(DALI, INFO, waves(1))
    assert not uses_dali(TORCH, cifar, files)


WITHOUT_DALI = """
    import sys, warnings
    from pathlib import Path

    class NoDali:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("nvidia.dali"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, NoDali())
    from PIL import Image
    import kiop_fast.pipeline
    from kiop_fast.config import LoadingConfig, PretrainConfig
    from kiop_fast.data import dataset, open_loader
    from kiop_fast.errors import DataError
    from kiop_fast.pretrain import pretrain

    root = Path(sys.argv[1])
    for i in range(20):
        (root / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        file = root / "pictures" / "ab"[i % 2] / f"{i}.png"
        Image.new("RGB", (20, 17), (200 * (i % 2), 5 * i, 90)).save(file)
    data = f"folder:{root / 'pictures'}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = PretrainConfig(data=data, side=16, epochs=1, batch=4)
        pretrain(config, root / "m.safetensors")
        train = dataset(data).train(16)
        loader = open_loader(train, dataset(data).info, batch=2)
        assert loader.kind == "torch" and len(list(loader.epoch(0))) == 8
    assert ["DALI is not installed" in str(w.message) for w in said] == [True], said
    try:
        open_loader(train, dataset(data).info, batch=2, loading=LoadingConfig(loader="dali"))
    except DataError as error:
        assert "pip install nvidia-dali" in str(error), error
    else:
        raise SystemExit("no error")
"""


def test_without_dali_everything_imports_trains_and_reads(tmp_path: Path) -> None:
    """What is missing is said once, and asking for it by name is an error."""
    program = textwrap.dedent(WITHOUT_DALI)
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


# --- with a GPU ----------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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


@pytest.mark.gpu
@gpu
def test_gpu_batches_that_are_kept_stay_what_they_were() -> None:
    """While torch writes over freed memory and DALI makes the next batches."""
    loader = open_loader(waves(64), INFO, batch=8, loading=DALI, device="cuda")
    kept, copies = [], []
    for epoch in range(4):
        for x, _ in loader.epoch(epoch):
            kept.append(x)
            copies.append(x.clone())
            torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))
