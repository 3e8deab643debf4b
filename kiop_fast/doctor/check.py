"""One finding of the doctor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kiop_fast.errors import KiopError

STATES = ("pass", "note", "FAIL")  # a note: something optional is not there, everything runs


@dataclass(frozen=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: what was looked at.
        state: ``pass``, ``note`` or ``FAIL``.
        found: in words, with numbers and units.
        fix: what to do; empty where nothing has to be done.
    """

    name: str
    state: str
    found: str
    fix: str = ""


def failed(checks: Sequence[Check]) -> bool:
    """Whether anything has to be mended."""
    return any(check.state == "FAIL" for check in checks)


def look(name: str, check: Callable[[], Check]) -> Check:
    """``check()``, or what stopped it as a failure with its own way out."""
    try:
        return check()
    except KiopError as error:
        return Check(name, "FAIL", *as_finding(error))
    except Exception as error:  # whatever a driver or library raises is the finding
        text = (str(error).strip().splitlines() or [""])[0]
        return Check(name, "FAIL", f"{type(error).__name__}: {text[:200]}",
                     "run the command that fails alone, or report this line")  # fmt: skip


def as_finding(error: KiopError) -> tuple[str, str]:
    """What an error found, and its way out."""
    first, *rest = str(error).splitlines()
    lines = {kind: text.strip() for kind, _, text in (line.partition(":") for line in rest)}
    got = lines.get("  got")
    return first + (f" (got: {got})" if got else ""), lines.get("  do", "")


def size(count: float) -> str:
    """Bytes in MB or GB (10⁶, 10⁹)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
