"""Every error a user can meet: what was got, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KiopError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence that names the problem.
        got: what was found (a value, a shape, a path).
        expected: what would have been right; shapes and valid choices.
        fix: what the user can do about it.
    """

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        lines = [what]
        if got is not None:
            lines.append(f"  got:      {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  do:       {fix}")
        super().__init__("\n".join(lines))


class ConfigError(KiopError):
    """A setting, preset, key or combination of settings that cannot be run."""


class DataError(KiopError):
    """A dataset or image that cannot be found, read or used."""


class SourceError(KiopError):
    """A source model that cannot be built, loaded, verified or used."""


class MappingError(KiopError):
    """A label mapping that cannot be made or applied."""


class PromptError(KiopError):
    """Rings that do not nest, cells of the wrong shape, a depth that does not exist."""


class ArtefactError(KiopError):
    """A prompt file that is damaged, of another version, or for another model."""


class RunError(KiopError):
    """A run folder that cannot be started, continued or read."""


class NonFiniteLossError(KiopError):
    """A loss term became NaN or infinite; the last checkpoint is intact."""


class KernelError(KiopError):
    """Arguments a kernel cannot take, or a kernel backend that is not there."""


class GraphError(KiopError):
    """A step that cannot be captured as a CUDA graph."""


class OutOfMemoryError(KiopError):
    """A device's memory does not hold the run."""


class UpstreamError(KiopError):
    """The authors' code is not there, or not of a version that can be accelerated."""


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[KiopError]) -> KiopError:
    """An ``error`` for a ``name`` that is not among ``known``, with the close matches."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"
    shown = ", ".join(known) if len(known) <= 30 else f"{len(known)} names, e.g. {known[0]}"
    return error(f"unknown {kind} {name!r}", got=name, expected=shown, fix=hint)
