"""Watching a period: progress for who listens, an error for a loss that is no longer finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from kiop_fast.errors import NonFiniteLossError
from kiop_fast.runtime.progress import Progress


def reporter(
    progress: Progress | None, stage: str, before: int, total: int
) -> Callable[[int, Tensor], None] | None:
    """Tell ``progress`` about every tenth step; None where nobody listens."""
    if progress is None:
        return None

    def on_step(done: int, loss: Tensor) -> None:
        if done % 10 == 0 or before + done == total:
            # Looking at a loss on a GPU would wait for it.
            seen = {"loss": float(loss)} if loss.is_cpu else {}
            progress(stage, before + done, total, **seen)

    return on_step


def check_finite(losses: Tensor, terms: Iterable[str], epoch: int, task: str) -> None:
    """Raise NonFiniteLossError for the first bad step of ``losses`` (steps, terms)."""
    bad = ~losses.isfinite()
    if bad.any():
        step = int(bad.any(dim=1).nonzero()[0])
        names = [t for t, b in zip(terms, bad[step].tolist(), strict=False) if b]
        raise NonFiniteLossError(
            f"the loss of {task!r} is no longer finite",
            got=f"epoch {epoch + 1}, step {step + 1}, term {names[0]}: {losses[step].tolist()}",
            expected="finite loss terms",
            fix="lower the learning rate or that term's weight; the last checkpoint is intact",
        )
