"""Datasets by name."""

from __future__ import annotations

from kiop_fast.data import folder, torchvision_sets
from kiop_fast.data.digits import DIGITS
from kiop_fast.data.letters import LETTERS
from kiop_fast.data.names import BUILT_IN
from kiop_fast.data.shapes import SHAPES
from kiop_fast.data.spec import Dataset
from kiop_fast.errors import DataError, unknown_name

_OURS: dict[str, Dataset] = {
    made.info.name: made for made in (LETTERS, DIGITS, SHAPES, *torchvision_sets.DATASETS)
}
_DATASETS = dict(_OURS)

__all__ = ["BUILT_IN", "dataset", "known", "register"]


def dataset(name: str) -> Dataset:
    """The dataset of that name, or ``folder:PATH``; no image is read yet.

    Raises:
        DataError: there is none, with the close matches.
    """
    if name.startswith(folder.PREFIX) and name not in _DATASETS:
        _DATASETS[name] = folder.folder_dataset(name)
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
