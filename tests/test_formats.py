"""Small files in every real on-disk format, read through the same code as the real datasets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import (
    pictures,
    write_cifar,
    write_folder,
    write_gtsrb,
    write_mnist,
    write_svhn,
)
from PIL import Image

from kiop_fast.config import LoadingConfig
from kiop_fast.data import FileSplit, dataset, download
from kiop_fast.data.folder import folder_dataset
from kiop_fast.errors import DataError

LABELS = [3, 0, 9, 1, 1, 7, 2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path))
    return tmp_path


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "unpacked"])
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fmnist", "FashionMNIST")])
def test_idx_files(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, packed: bool
) -> None:
    images = pictures(7, 28, 28)
    folder = write_mnist(root, monkeypatch, images, LABELS, kind=kind, packed=packed)
    for split in (dataset(name).train(28), dataset(name).test(28)):
        assert torch.equal(split.images[:, 0], torch.from_numpy(images))
        assert split.labels.tolist() == LABELS
    assert dataset(name).train(32).images.shape == (7, 1, 32, 32)
    if packed:  # a damaged download is never unpacked
        for file in folder.glob("*ubyte"):
            file.unlink()
        damaged = folder / "train-images-idx3-ubyte.gz"
        damaged.write_bytes(damaged.read_bytes()[:-9])
        with pytest.raises(DataError, match="another checksum"):
            dataset(name).train(28)


@pytest.mark.parametrize("fine", [False, True], ids=["cifar10", "cifar100"])
def test_pickled_batches(root: Path, monkeypatch: pytest.MonkeyPatch, fine: bool) -> None:
    name, images = "cifar100" if fine else "cifar10", pictures(7, 32, 32, 3)
    labels = [99, *LABELS[1:]] if fine else LABELS
    folder = write_cifar(root, monkeypatch, images, labels, fine=fine)
    for split in (dataset(name).train(32), dataset(name).test(32)):
        assert torch.equal(split.images, channels_first(images))
        assert split.labels.tolist() == labels
    batch = folder / ("train" if fine else "data_batch_2")
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="corrupted"):
        dataset(name).train(32)


def test_mat_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(7, 32, 32, 3)
    paths = write_svhn(root, monkeypatch, images, LABELS)
    for split in (dataset("svhn").train(32), dataset("svhn").test(32)):
        assert torch.equal(split.images, channels_first(images))
        assert split.labels.tolist() == LABELS
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(DataError, match="corrupted"):
        dataset("svhn").train(32)


def test_ppm_and_csv(root: Path) -> None:
    sizes = [(30, 40), (61, 50), (33, 33)]
    images = [pictures(i + 1, *size, 3)[i] for i, size in enumerate(sizes)]
    base = write_gtsrb(root, images, [7, 0, 42])
    train, test = dataset("gtsrb").train(32), dataset("gtsrb").test(32)
    assert isinstance(train, FileSplit)
    assert train.labels.tolist() == [0, 7, 42]  # of the folders, not counted from 0
    assert test.labels.tolist() == [7, 0, 42]
    assert torch.equal(train.images[[1, 0, 2]], test.images)
    # GT-final_test.csv also holds a region of interest; as upstream, the whole picture is used.
    expected = np.asarray(Image.fromarray(images[0]).resize((32, 32), Image.Resampling.BILINEAR))
    seen = test.images[0].permute(1, 2, 0).numpy()
    assert np.abs(seen.astype(int) - expected).max() <= 1
    (base / "GTSRB" / "Final_Test" / "Images" / "00001.ppm").unlink()
    with pytest.raises(DataError, match=r"00001\.ppm"):
        dataset("gtsrb").test(32)
    (base / "GT-final_test.csv").write_text("Filename;Width\n00000.ppm;3\n")
    with pytest.raises(DataError, match="ClassId"):
        dataset("gtsrb").test(32)


def test_labels_beyond_the_classes(root: Path) -> None:
    write_gtsrb(root, [pictures(1, 20, 20, 3)[0]], [43])
    with pytest.raises(DataError, match="labels are not 0 to 42"):
        dataset("gtsrb").train(32)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "gtsrb"])
def test_a_download_without_network(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One message, whatever torchvision and urllib raise; nothing listens on port 9."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(DataError, match=rf"'{name}' cannot be downloaded(.|\n)*a network"):
        download(name)


# --- folders -----------------------------------------------------------------------------------


def some(count: int, suffix: str, shift: int = 0) -> list[tuple[str, np.ndarray]]:
    images = pictures(count + shift, 20 + shift, 24, 3)[shift:]
    return [(f"{i}.{suffix}", image) for i, image in enumerate(images)]


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets" / "train", {"cat": some(3, "png"), "dog": some(2, "jpg", 3)})
    write_folder(tmp_path / "pets" / "test", {"cat": some(1, "ppm"), "dog": some(1, "bmp", 3)})
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("not a picture")
    made = folder_dataset(f"folder:{tmp_path / 'pets'}")
    assert made.info.classes == ("cat", "dog")
    assert (made.info.task, made.info.channels) == ("pets", 3)
    assert made.train(32).labels.tolist() == [0, 0, 0, 1, 1]
    assert made.train(32).images.shape == (5, 3, 32, 32)
    assert made.test(16).images.shape == (2, 3, 16, 16)


def test_folder_without_a_test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": some(10, "png"), "b": some(2, "png"), "c": some(6, "png")})
    made = folder_dataset(f"folder:{tmp_path}")
    train, test = made.train(8), made.test(8)
    assert not set(train.paths) & set(test.paths)
    assert len(train.paths) + len(test.paths) == 18
    assert test.labels.bincount().tolist() == [2, 1, 1]  # a fifth, at least one
    assert folder_dataset(f"folder:{tmp_path}").test(8).paths == test.paths


def test_facts_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": some(2, "png"), "b": some(2, "png")})
    (tmp_path / "dataset.toml").write_text(
        "mean = [0.4, 0.5, 0.6]\nstd = [1, 0.5, 0.25]\nchannels = 1\npad = 2\nflip = 0.5\nside = 20"
    )
    info = folder_dataset(f"folder:{tmp_path}").info
    assert (info.mean, info.std) == ((0.4, 0.5, 0.6), (1.0, 0.5, 0.25))
    assert (info.channels, info.pad, info.flip, info.side) == (1, 2, 0.5, 20)
    assert folder_dataset(f"folder:{tmp_path}").train(8).images.shape[1] == 1
    for text, message in (
        ("means = [1, 2, 3]", "did you mean mean"),
        ("mean = ", "no valid TOML"),
        ("pad = 'much'", "no number"),
        ("std = [0, 1, 1]", "above 0"),
    ):
        (tmp_path / "dataset.toml").write_text(text)
        with pytest.raises(DataError, match=message):
            folder_dataset(f"folder:{tmp_path}")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        dataset(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no class folder"):
        dataset(f"folder:{tmp_path}")
    write_folder(tmp_path / "train", {"a": some(1, "png"), "b": some(1, "png")})
    with pytest.raises(DataError, match="no test pictures"):
        folder_dataset(f"folder:{tmp_path}").test(8)
    write_folder(tmp_path / "val", {"a": some(1, "png")})
    with pytest.raises(DataError, match=r"other classes(.|\n)*got: +b"):
        folder_dataset(f"folder:{tmp_path}")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(DataError, match=r"class folder is empty(.|\n)*val/b"):
        folder_dataset(f"folder:{tmp_path}").test(8)


# --- files that do not decode ------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> FileSplit:
    """Five whole pictures; a truncated JPEG, PNG and PPM, an empty file, a text."""
    files = [some(5, s)[i] for i, s in enumerate(("jpg", "png", "ppm", "jpg", "png"))]
    write_folder(tmp_path, {"a": files})
    whole = sorted((tmp_path / "a").iterdir())
    bad = []
    for i, path in enumerate(whole[:3]):
        bad.append(path.with_name(f"bad{i}{path.suffix}"))
        bad[-1].write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, content in (("bad3.png", b""), ("bad4.jpg", b"not a picture")):
        bad.append(tmp_path / "a" / name)
        bad[-1].write_bytes(content)
    mixed = [path for pair in zip(whole, bad, strict=True) for path in pair]
    return FileSplit(tuple(mixed), torch.arange(10), 16, 3)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_undecodable_files_are_named_or_skipped(damaged: FileSplit, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    with pytest.raises(
        DataError, match=r"5 image files do not decode(.|\n)*bad0\.jpg, .*bad4\.jpg"
    ):
        damaged.decoded(LoadingConfig(loader=loader))
    skip = LoadingConfig(loader=loader, undecodable="skip")
    with pytest.warns(UserWarning, match=r"skipped 5 image files .*bad3\.png"):
        split = damaged.decoded(skip)
    assert split.labels.tolist() == [0, 2, 4, 6, 8]
    whole = FileSplit(damaged.paths[::2], damaged.labels[::2], 16, 3)
    assert torch.equal(split.images, whole.decoded(LoadingConfig(loader=loader)).images)
    hopeless = FileSplit(damaged.paths[1::2], damaged.labels[1::2], 16, 3)
    with pytest.raises(DataError, match="5 image files do not decode"):
        hopeless.decoded(skip)


def test_grey_colour_and_alpha_files(tmp_path: Path) -> None:
    """Grey is repeated, alpha dropped, 16 bits scaled to 8, in both decoders alike."""
    colour = pictures(1, 40, 30, 3)[0]
    grey = colour[..., 0]
    alpha = np.dstack([colour, np.full((40, 30), 90, np.uint8)])
    paths = []
    for name, pixels in (
        ("grey.png", grey), ("grey.jpg", grey), ("grey.pgm", grey), ("colour.png", colour),
        ("alpha.png", alpha), ("grey16.png", grey.astype(np.uint16) * 257),
    ):  # fmt: skip
        paths.append(tmp_path / name)
        Image.fromarray(pixels).save(paths[-1])
    loaders = ["torch"]
    if "nvidia.dali" in sys.modules or pytest.importorskip("nvidia.dali"):
        loaders.append("dali")
    for loader in loaders:
        split = FileSplit(tuple(paths), torch.arange(6), 32, 3)
        images = split.decoded(LoadingConfig(loader=loader)).images.int()
        assert torch.equal(images[0, 0], images[0, 1])
        assert torch.equal(images[0], images[2])  # png and pgm
        assert torch.equal(images[0], images[5])  # and 16 bits
        assert torch.equal(images[3], images[4])  # alpha dropped
        single = FileSplit(tuple(paths), torch.arange(6), 32, 1)
        ones = single.decoded(LoadingConfig(loader=loader)).images.int()
        assert ones.shape == (6, 1, 32, 32)
        assert torch.equal(ones[0, 0], images[0, 0])
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
        luma = (images[3] * weights.view(3, 1, 1)).sum(0)
        assert (ones[3, 0] - luma).abs().max() <= 2.5
