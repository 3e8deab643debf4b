"""Progress of long stages: rich bars on a terminal, silence elsewhere."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import Any, Protocol

_EPOCH = re.compile(r"epoch (\d+)/(\d+)\s+(.*)")
_USUAL_STAGES = 3  # of an epoch, until the first one has shown how many there are


class Progress(Protocol):
    """What long stages call: ``progress("pretrain letters", 3, 10, loss=0.7)``."""

    def __call__(self, stage: str, done: int, total: int, **values: float) -> None: ...


class SilentProgress:
    """Says nothing; for pipes, logs and ``--quiet``."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, stage: str, done: int, total: int, **values: float) -> None:
        return None


class RichProgress:
    """A bar for the stage at work, with its losses, and one for the whole run.

    Stages called ``epoch i/n  NAME`` also move the bar of the run; a finished stage makes room
    for the next.  Drawing is throttled to ``interval`` seconds.
    """

    def __init__(self, console: Any = None, interval: float = 0.1) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(),
            TimeRemainingColumn(compact=True), TextColumn("[dim]{task.fields[values]}"),
            console=console or Console(stderr=True), transient=True, refresh_per_second=8,
        )  # fmt: skip
        self._interval, self._last = interval, 0.0
        self._stage = ""
        self._bar: Any = None
        self._run: Any = None
        self._seen: dict[int, list[str]] = {}

    def __enter__(self) -> RichProgress:
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._bars.__exit__(kind, error, trace)

    def __call__(self, stage: str, done: int, total: int, **values: float) -> None:
        now = time.monotonic()
        new = stage != self._stage
        if not new and done < total and now - self._last < self._interval:
            return
        self._last = now
        found = _EPOCH.match(stage)
        if found:
            self._move_run(int(found[1]), int(found[2]), found[3], done / max(total, 1))
        if new:
            if self._bar is not None:
                self._bars.remove_task(self._bar)
            label = found[3] if found else stage
            self._bar = self._bars.add_task(label, total=total, values="")
            self._stage = stage
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bars.update(self._bar, completed=done, total=total, values=text)

    def _move_run(self, epoch: int, epochs: int, name: str, share: float) -> None:
        """The run's bar counts epochs, with the part of the present one that is done."""
        names = self._seen.setdefault(epoch, [])
        if name not in names:
            names.append(name)
        before = [len(n) for e, n in self._seen.items() if e < epoch]
        stages = max(before, default=max(_USUAL_STAGES, len(names)))
        inside = min((names.index(name) + share) / stages, 1.0)
        if self._run is None:
            self._run = self._bars.add_task("epochs", total=epochs * 100, values="")
        self._bars.update(self._run, completed=round((epoch - 1 + inside) * 100),
                          description=f"[bold]epoch {epoch}/{epochs}")  # fmt: skip


def make_progress(*, quiet: bool = False) -> RichProgress | SilentProgress:
    """Bars where standard output and error are a terminal, silence otherwise or if ``quiet``."""
    if quiet or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return SilentProgress()
    return RichProgress()
