"""Do the parts of an artefact fit together?  Asked whenever one is made or read."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from kiop_fast.config import BATCHNORM_POLICIES
from kiop_fast.errors import ArtefactError, unknown_name

if TYPE_CHECKING:
    from kiop_fast.prompt.artefact import Artefact
    from kiop_fast.prompt.served import ArtefactTask


def check_parts(artefact: Artefact) -> None:
    """Raise ArtefactError unless all parts fit together."""
    sides, cells = (artefact.side, *artefact.rings), artefact.cells
    channels = cells[0].shape[0] if cells else 0
    expected = [(channels, b * b - a * a) for a, b in pairwise(sides)]
    got = [tuple(ring.shape) for ring in cells]
    if not got or got != expected or any(a >= b for a, b in pairwise(sides)):
        raise ArtefactError(
            "the ring cells do not fit the rings", got=f"cells {got}",
            expected=f"(channels, S² - s²) for side {artefact.side}, rings {artefact.rings}: "
            f"{expected}",
        )  # fmt: skip
    if artefact.batchnorm not in BATCHNORM_POLICIES:
        raise unknown_name(
            "BatchNorm policy", artefact.batchnorm, BATCHNORM_POLICIES, ArtefactError
        )
    names = [task.name for task in artefact.tasks]
    if not names or len(set(names)) != len(names):
        raise ArtefactError("tasks need names of their own", got=names, expected="different names")
    for task in artefact.tasks:
        _check_task(task, artefact)


def _check_task(task: ArtefactTask, artefact: Artefact) -> None:
    classes = len(task.info.classes)
    if not 1 <= task.depth <= len(artefact.rings):
        raise ArtefactError(f"task {task.name!r}: no such depth", got=task.depth,
                            expected=f"1 … {len(artefact.rings)}")  # fmt: skip
    if task.mapping is None:
        if classes != artefact.target.classes:
            raise ArtefactError(
                f"task {task.name!r} has no mapping, but other classes than the target",
                got=f"{classes} classes, target {artefact.target.classes}",
                expected="a mapping of one target class for each of the task's classes",
            )
        return
    if tuple(task.mapping.shape) != (classes,):
        raise ArtefactError(f"task {task.name!r}: mapping of the wrong shape",
                            got=tuple(task.mapping.shape), expected=(classes,))  # fmt: skip
    low, high = int(task.mapping.min()), int(task.mapping.max())
    if low < 0 or high >= artefact.target.classes:
        raise ArtefactError(
            f"task {task.name!r}: the mapping names classes that the target does not have",
            got=f"{low} … {high}", expected=f"0 … {artefact.target.classes - 1}",
        )  # fmt: skip
