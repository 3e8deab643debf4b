"""What a family of models knows of itself: classes, normaliser and image side of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kiop_fast.data import DatasetInfo, dataset
from kiop_fast.errors import SourceError

PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Lightning, torch.compile


@dataclass(frozen=True)
class Known:
    """Facts that come with a model.

    Attributes:
        classes: names, as many as the model has outputs; None: not known without its weights.
        mean, std: the normaliser it was trained with.
        side: image side it was trained at, pixels.
        classifier: name of the layer that makes the logits; empty: not known.
    """

    classes: tuple[str, ...] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side: int
    classifier: str = ""


def strip_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the wrappers (``module.`` and the like) that all of them begin with."""
    stripped = dict(weights)
    found = True
    while found and stripped:
        found = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in stripped):
                stripped = {key[len(prefix) :]: value for key, value in stripped.items()}
                found = True
    return stripped


def classes_in(weights: Mapping[str, Tensor], classifier: str) -> int | None:
    """Outputs of the classifier whose weights these are; None if it is not among them."""
    for end in (".weight", ".bias"):
        if classifier + end in weights:
            return len(weights[classifier + end])
    return None


def combine(
    data: str, known: Known | None, label: str, weights: Mapping[str, Tensor]
) -> DatasetInfo:
    """Facts about a source's data: of the dataset named, the normaliser of what is known.

    Args:
        data: name of a dataset; empty: the classes and side come from ``known`` and ``weights``.
        known: what the family of models says; None: nothing.
        label: what the task is called where no dataset is named.
        weights: the given ones, by key; empty: the model brings its own.

    Raises:
        SourceError: neither a dataset nor facts; another number of classes than the dataset's.
        DataError: no such dataset.
    """
    if data:
        info = dataset(data).info
        if known is None:
            return info
        count = None if weights or known.classes is None else len(known.classes)
        if count not in (None, len(info.classes)):
            raise SourceError(
                f"the pretrained weights of {label} are for other classes than {data}'s",
                got=f"{count} classes", expected=f"{len(info.classes)} classes",
                fix=f"train it on {data}: kiop-fast pretrain --arch {label} --data {data}, or "
                "leave the dataset out",
            )  # fmt: skip
        return replace(info, mean=known.mean, std=known.std)
    if known is None:
        raise SourceError(
            f"the data of source {label!r} is not known",
            got="no dataset named, and no facts in the file",
            expected="NAME@DATA[=PATH]: classes and normaliser come from the dataset",
            fix=f"for example {label}@cifar100",
        )
    classes = known.classes
    if weights:
        count = classes_in(weights, known.classifier)
        if count is None:
            raise SourceError(
                f"the number of classes of {label} is not in its file",
                got=f"no {known.classifier or 'classifier'}.weight among {len(weights)} tensors",
                expected="the weights of the layer that makes the logits",
                fix="name the dataset the model was trained on: NAME@DATA=PATH",
            )
        if classes is None or len(classes) != count:
            classes = numbered(count)
    assert classes is not None
    name = label.rpartition(":")[2].rpartition("/")[2]
    return DatasetInfo(name, known.side, 3, classes, known.mean, known.std)


def numbered(count: int) -> tuple[str, ...]:
    """Class names where none are known."""
    return tuple(f"class {i}" for i in range(count))
