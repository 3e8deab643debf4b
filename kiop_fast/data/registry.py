"""Datasets by name."""

from __future__ import annotations

from kiop_fast.data import torchvision_sets
from kiop_fast.data.digits import DIGITS
from kiop_fast.data.letters import LETTERS
from kiop_fast.data.shapes import SHAPES
from kiop_fast.data.spec import Dataset
from kiop_fast.errors import DataError, unknown_name

BUILT_IN = ("letters", "digits", "shapes")  # need no download

_OURS: dict[str, Dataset] = {
    made.info.name: made for made in (LETTERS, DIGITS, SHAPES, *torchvision_sets.DATASETS)
}
_DATASETS = dict(_OURS)


def dataset(name: str) -> Dataset:
    """The dataset of that name; no image is read yet.

    Raises:
        DataError: there is none, with the close matches.
    """
    if name not in _DATASETS:
        raise unknown_name("dataset", name, _DATASETS, DataError)
    return _DATASETS[name]


def register(new: Dataset) -> Dataset:
    """Make your own dataset known by its name; ``new`` itself.

    Raises:
        DataError: the name belongs to a dataset of this package.
    """
    name = new.info.name
    if _OURS.get(name, new) is not new:
        raise DataError(
            f"a dataset named {name!r} comes with kiop_fast",
            got=name,
            expected=f"none of {', '.join(_OURS)}",
            fix="give the dataset another name in its DatasetInfo",
        )
    _DATASETS[name] = new
    return new


def known() -> list[str]:
    """Names of all datasets."""
    return sorted(_DATASETS)
