"""Label mappings that are made anew on the banks while a run learns (SPEC section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kiop_fast.prompt import bank_logits, bank_mapping
from kiop_fast.runtime.profile import OnStep

if TYPE_CHECKING:
    from kiop_fast.run import Run


def made_anew(run: Run, turn: int) -> dict[str, Tensor]:
    """Copies of the mappings that a round makes anew, by task.

    With rule ``random`` that is none, with ``frequency`` those of the first round.

    Args:
        turn: rounds (of synthesizing and storing) that came before.
    """
    rule = run.config.prompt.mapping
    if rule == "random" or (rule == "frequency" and turn > 0):
        return {}
    return {task.name: task.mapping.clone() for task in run.tasks if task.mapping is not None}


@torch.no_grad()
def remap(run: Run, turn: int, *, begun: bool = False) -> None:
    """Make anew the mappings of a round, in place: captured steps read them.

    Args:
        turn: rounds that came before.
        begun: the round's storing period has begun; its mappings are where a search starts.
    """
    rule, temperature = run.config.prompt.mapping, run.config.storing.temperature
    moving = made_anew(run, turn)
    for task in run.tasks:
        if task.mapping is None or task.name not in moving:
            continue
        before = moving[task.name] if turn or begun else None
        seen, batch = run.prompted(task), run.config.prompt.calibration_batch
        said = bank_logits(seen.logits, task.source.model, run.bank_images(task), batch)
        task.mapping.copy_(bank_mapping(rule, *said, before, temperature))


def remapping_on_step(run: Run, turn: int, on_step: OnStep | None) -> OnStep | None:
    """``on_step`` of a storing period that also makes mappings, every ``prompt.mapping_steps``."""
    every, last = run.config.prompt.mapping_steps, run.config.storing.steps
    if not every or not made_anew(run, turn):
        return on_step

    def also(done: int, loss: Tensor) -> None:
        if done % every == 0 and done < last:
            remap(run, turn, begun=True)
        if on_step is not None:
            on_step(done, loss)

    return also
