"""``folder:PATH``: your own pictures, one folder a class.

``PATH/train/CLASS/…`` and ``PATH/test/CLASS/…`` (or ``val``), or ``PATH/CLASS/…`` alone: then a
fixed random fifth of every class is for testing.  Pictures of any size, grey, colour or with
alpha (which is dropped), are stretched to the side of the run.  ``PATH/dataset.toml`` may state
``mean``, ``std`` (in [0, 1], three each), ``channels``, ``pad``, ``flip`` and ``side``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kiop_fast.data.files import FileSplit
from kiop_fast.data.spec import Dataset, DatasetInfo
from kiop_fast.errors import DataError, unknown_name
from kiop_fast.runtime import draws

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "folder:"
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")
TEST_SHARE = 5  # one picture in so many, of every class, where there is no test folder
_FACTS = ("mean", "std", "channels", "pad", "flip", "side")


def folder_dataset(name: str) -> Dataset:
    """The dataset ``folder:PATH``; file names are read, no picture is.

    Raises:
        DataError: no such folder, no class folder, an empty one, classes that differ between
            train and test, or a damaged ``dataset.toml``.
    """
    root = Path(name[len(PREFIX) :]).expanduser()
    if not root.is_dir():
        raise DataError("no such folder of pictures", got=root.absolute(),
                        expected="PATH/CLASS/picture.png, or PATH/train/CLASS/… and "
                        "PATH/test/CLASS/…", fix="check the path")  # fmt: skip
    train, test = root / "train", _test_folder(root)
    parted = train.is_dir()
    classes = _classes(train if parted else root)
    if parted and test is not None and _classes(test) != classes:
        odd = sorted(set(_classes(test)) ^ set(classes))
        raise DataError(f"{root}: train and test have other classes", got=", ".join(odd[:5]),
                        expected="the same class folders", fix="mend the folders")  # fmt: skip
    facts = _facts(root)
    info = DatasetInfo(name, facts.pop("side", 32), facts.pop("channels", 3), classes, **facts)

    def read(split: str, side: int) -> FileSplit:
        return _read(root, info, split, side)

    return Dataset(info, partial(read, "train"), partial(read, "test"))


def _test_folder(root: Path) -> Path | None:
    return next((root / n for n in ("test", "val") if (root / n).is_dir()), None)


def _classes(folder: Path) -> tuple[str, ...]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not found:
        raise DataError("a folder of pictures has no class folder", got=folder.absolute(),
                        expected="one folder a class", fix="check the path")  # fmt: skip
    return tuple(found)


def _read(root: Path, info: DatasetInfo, split: str, side: int) -> FileSplit:
    parted = (root / "train").is_dir()
    folder = root / "train" if parted and split == "train" else root
    if parted and split == "test":
        test = _test_folder(root)
        if test is None:
            raise DataError(f"{root} has no test pictures", got="a folder train alone",
                            expected="train and test (or val)", fix="add them")  # fmt: skip
        folder = test
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(info.classes):
        files = _pictures(folder / name)
        if not parted:
            files = _share(files, name, split)
        paths += files
        labels += [label] * len(files)
    return FileSplit(tuple(paths), torch.tensor(labels, dtype=torch.int64), side, info.channels)


def _pictures(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise DataError("a class folder is empty", got=folder.absolute(),
                        expected=f"pictures ({' '.join(SUFFIXES)})",
                        fix="fill it, or remove it")  # fmt: skip
    return files


def _share(files: list[Path], name: str, split: str) -> list[Path]:
    """A class's pictures of one split: a fifth, at least one of two or more, is for testing."""
    rng = draws.generator(0, 0, name, "folder split")
    count = max(len(files) // TEST_SHARE, min(1, len(files) - 1))
    test = set(rng.permutation(len(files))[:count].tolist())
    return [file for i, file in enumerate(files) if (i in test) == (split == "test")]


def _facts(root: Path) -> dict[str, Any]:
    file = root / "dataset.toml"
    if not file.exists():
        return {}
    try:
        facts = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError("dataset.toml is no valid TOML", got=f"{file}: {error}",
                        expected="for example mean = [0.5, 0.5, 0.5]",
                        fix="mend that line") from None  # fmt: skip
    for key in facts:
        if key not in _FACTS:
            raise unknown_name(f"fact in {file}", key, _FACTS, DataError)
    try:
        facts |= {key: tuple(map(float, facts[key])) for key in ("mean", "std") if key in facts}
        whole = {key: int(facts[key]) for key in ("channels", "pad", "side") if key in facts}
        facts |= whole | {key: float(facts[key]) for key in ("flip",) if key in facts}
    except (TypeError, ValueError) as error:
        raise DataError(f"a fact in {file} is no number", got=error,
                        expected="mean, std: three numbers; the others: one",
                        fix="mend that line") from None  # fmt: skip
    return facts
