"""Built-in tasks are the same pictures everywhere; downloaded ones fail clearly when absent."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kiop_fast.data import Dataset, DatasetInfo, Split, dataset, known, register
from kiop_fast.data.digits import split_indices
from kiop_fast.data.drawing import MASK_FILL, MASK_SIDE, Look, draw, fill
from kiop_fast.data.resize import resize
from kiop_fast.data.torchvision_sets import INFOS, _read_whole, download
from kiop_fast.errors import DataError
from kiop_fast.runtime import draws


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# Recorded once; a change here changes what every published number was measured on.
FIRST_PICTURES = {
    ("letters", "train"): "f5f6686fc5dbd9f3de7d1628cc7a78855eb302973872c5c170892897e9c92040",
    ("letters", "test"): "6fd6b1833492aaece4bc5c97b946c457f00ef6d0070a7893c16b83c9d9a15d29",
    ("shapes", "train"): "993f1b126a1a49742153612ec62c934ca38a4ad664e869049ef5a20f6f871b1f",
    ("shapes", "test"): "33252de43368ceea9936a58bf94974e5b3da592710109b53cad0f5a917d4a218",
    ("digits", "train"): "667b5295060ccac0378f913cd879ea58543301b09247042febcff6c65683a7ad",
    ("digits", "test"): "d1c199571554d009bf1fa83e9d2d4415a7a2cede980a89502b9f3b65386a6d42",
}


@pytest.mark.parametrize(("name", "split"), FIRST_PICTURES)
def test_first_pictures_never_change(name: str, split: str) -> None:
    read = getattr(dataset(name), split)(16)
    assert sha256(read.images[:52].numpy()) == FIRST_PICTURES[name, split]


def test_digits_split_never_changes() -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target.astype(np.int64)
    train, test = split_indices(labels)
    assert (sha256(train.astype("<i8")), sha256(test.astype("<i8"))) == (
        "aeaa9bac641149019c93395235d8d80e6506d5ed890ede991729440eef4802e0",
        "e5c25a6d83e8284efbc9442cea331f644830f321fc038f756a30fc235ac15a4c",
    )
    assert np.bincount(labels[test]).tolist() == [36] * 10
    assert sorted([*train, *test]) == list(range(1797))


@pytest.mark.parametrize(
    ("name", "channels", "train", "test"),
    [("letters", 3, 26 * 300, 26 * 40), ("digits", 1, 1437, 360), ("shapes", 3, 3000, 400)],
)
def test_splits_of_built_in_tasks(name: str, channels: int, train: int, test: int) -> None:
    task = dataset(name)
    for read, count in ((task.train, train), (task.test, test)):
        split = read(16)
        assert split.images.shape == (count, channels, 16, 16)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert sorted(split.labels.unique().tolist()) == list(range(len(task.info.classes)))
        assert read(16).images is split.images  # drawn once a process
    assert task.info.channels == channels


def test_train_and_test_pictures_differ() -> None:
    for name in ("letters", "shapes", "digits"):
        train = {sha256(image) for image in dataset(name).train(16).images.numpy()}
        test = {sha256(image) for image in dataset(name).test(16).images.numpy()}
        assert not train & test


def test_any_side() -> None:
    for name in ("letters", "digits", "shapes"):
        assert dataset(name).test(12).images.shape[-2:] == (12, 12)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    mask = fill([np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])])[None, None]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw(mask, 4, 8, draws.generator(0, 0, "test", "x"), Look())
    torch.manual_seed(1)
    second = draw(mask, 4, 8, draws.generator(0, 0, "test", "x"), Look())
    assert torch.equal(first.images, second.images)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_fill_covers_the_area_of_the_figure() -> None:
    """Areas from geometry: a box of 1 x 2, a disc, a ring by its winding, two crossing boxes."""
    box = np.array([[0.0, 0], [1, 0], [1, 2], [0, 2]])
    angle = np.linspace(0, 2 * np.pi, 721)[:-1]
    disc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    upright = box - (0.5, 1)
    cross = [upright, upright[:, ::-1] * (-1, 1)]  # turned by a quarter
    unit = MASK_FILL**2  # the bounding square of the longer side, in pixels
    for outline, area in (
        ([box], 0.5),
        ([box[::-1]], 0.5),
        ([disc], np.pi / 4),
        ([disc, 0.5 * disc[::-1]], np.pi / 4 * 0.75),
        (cross, 0.75),
    ):
        covered = fill(outline).astype(np.float64).sum() / 255
        assert covered == pytest.approx(area * unit, rel=0.01)


def test_fill_is_upright_and_centred() -> None:
    triangle = fill([np.array([[-1.0, 0], [1, 0], [0, 1]])])  # base below, tip above
    rows = np.flatnonzero(triangle.max(axis=1))
    assert rows[0] + rows[-1] == MASK_SIDE - 1
    assert triangle[rows[2]].sum() < triangle[rows[-3]].sum()


def test_a_posed_box_keeps_its_area_and_colours() -> None:
    mask = fill([np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])])[None, None]
    plain = Look(rotation=0, scale=(1, 1), stretch=0, shift=0, noise=0, chalk=True)
    images = draw(mask, 8, 32, draws.generator(0, 0, "test", "box"), plain).images.double() / 255
    paper, ink = images[:, :, 0, 0], images[:, :, 16, 16]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert ((ink - paper) @ weights >= 0.35 - 2 / 255).all()
    share = (images - paper[..., None, None]).mean((2, 3)) / (ink - paper)
    distinct = (ink - paper).abs() > 0.2
    assert share[distinct].sub((MASK_FILL / MASK_SIDE) ** 2).abs().max() < 0.02


def test_labels_take_turns() -> None:
    split = dataset("letters").train(16)
    assert split.labels[:28].tolist() == [*range(26), 0, 1]


def test_resize_is_bilinear() -> None:
    image = torch.tensor([[[[0, 200]]]], dtype=torch.uint8).expand(1, 1, 2, 2)
    # Pixel centres at -0.25, 0.25, 0.75, 1.25 of the source: weights 1, 3/4, 1/4 of the left.
    assert resize(image, 4)[0, 0, 0].tolist() == [0, 50, 150, 200]
    assert resize(image, 2) is image


def test_unknown_dataset_names_close_matches() -> None:
    with pytest.raises(DataError, match="did you mean letters"):
        dataset("leters")


def test_own_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kiop_fast.data.registry._DATASETS", {})
    split = Split(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    own = Dataset(DatasetInfo("pets", 8, 1, ("cat", "dog")), lambda s: split, lambda s: split)
    assert register(own) is own
    assert dataset("pets") is own
    assert register(Dataset(own.info, own.train, own.test)) is not own  # a notebook's second run
    with pytest.raises(DataError, match="comes with kiop_fast"):
        register(Dataset(DatasetInfo("mnist", 8, 1, ("a",)), own.train, own.test))


def test_infos_of_the_papers_datasets() -> None:
    """SPEC section 10."""
    assert {name: len(info.classes) for name, info in INFOS.items()} == {
        "mnist": 10, "fmnist": 10, "cifar10": 10, "cifar100": 100, "svhn": 10, "gtsrb": 43,
    }  # fmt: skip
    assert [name for name, info in INFOS.items() if info.channels == 1] == ["mnist", "fmnist"]
    for name in ("mnist", "fmnist", "svhn"):
        assert (INFOS[name].mean, INFOS[name].std) == ((0.0,) * 3, (1.0,) * 3)
    assert INFOS["cifar100"].mean == (0.5071, 0.4867, 0.4408)
    assert INFOS["cifar10"].std == (0.2023, 0.1994, 0.2010)
    assert INFOS["gtsrb"].mean == INFOS["gtsrb"].std == (0.5,) * 3
    augmented = [name for name, info in INFOS.items() if (info.pad, info.flip) == (4, 0.5)]
    assert augmented == ["cifar10", "cifar100"]
    assert all(len(set(info.classes)) == len(info.classes) for info in INFOS.values())
    assert set(known()) >= {"letters", "digits", "shapes", *INFOS}


@pytest.mark.parametrize("name", INFOS)
def test_missing_files_name_folder_and_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError) as caught:
        dataset(name).train(32)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert f"download('{name}')" in str(caught.value)
    assert not (tmp_path / "nowhere").exists() or not any((tmp_path / "nowhere").rglob("*.*"))


def test_download_of_an_unknown_name() -> None:
    with pytest.raises(DataError, match="did you mean cifar10"):
        download("cifar")


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_from_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.zeros((3, 28, 28), np.uint8)
    images[1] = 77
    for start in ("train", "t10k"):
        _write_idx(folder / f"{start}-images-idx3-ubyte", images)
        _write_idx(folder / f"{start}-labels-idx1-ubyte", np.array([5, 0, 9], np.uint8))
        packed = gzip.compress((folder / f"{start}-images-idx3-ubyte").read_bytes())
        (folder / f"{start}-images-idx3-ubyte.gz").write_bytes(packed)
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path))
    split = dataset("mnist").train(32)
    assert split.images.shape == (3, 1, 32, 32)
    assert split.images[1].unique().tolist() == [77]
    assert split.labels.tolist() == [5, 0, 9]
    (folder / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match="mnist"):
        dataset("mnist").train(32)


def test_signs_from_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, size in ((0, 30), (7, 50)):
        folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (size, size + 5), (label, 100, 200)).save(folder / "00000_00000.ppm")
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path))
    split = dataset("gtsrb").train(16)
    assert split.images.shape == (2, 3, 16, 16)
    assert len(split.labels) == 2
    assert split.images[:, 1].unique().tolist() == [100]


def test_layouts_of_whole_arrays() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    cifar = SimpleNamespace(data=pixels, targets=[3, 1])
    svhn = SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.array([3, 1]))
    for opened in (cifar, svhn):
        images, labels = _read_whole(opened)
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert labels.tolist() == [3, 1]
