"""The ``.pth`` of a run under way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kiop_fast.dropin.checkpoint import (
    FORMAT,
    OWN,
    RING_NAMES,
    fusion_state,
    mask,
    optimizer_states,
    square,
    write_checkpoint,
)
from kiop_fast.run import Run

if TYPE_CHECKING:
    from kiop_fast.dropin.command import Job


@dataclass(frozen=True)
class Content:
    """Entries of a ``.pth``, ready to be written."""

    entries: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write them."""
        write_checkpoint(path, self.entries)


def checkpoint_of(job: Job, run: Run, done: int) -> Content:
    """What the scripts save after ``done`` epochs, and our own entry."""
    assert run.prompt is not None
    config, flags = job.config, job.flags
    side, rings = config.side, config.prompt.rings
    identity = job.script == "KiOP_BF" and len(rings) == 1
    cells = [ring.detach().cpu() for ring in run.prompt.cells]
    model = {k: v.contiguous() for k, v in run.sources.target.model.state_dict().items()}
    state = fusion_state(side, rings, cells, model, identity_ring=identity)
    buffers = momentum_squares(run)
    if identity:
        buffers.append(torch.zeros_like(state["modelD.program"]))
    count = len(rings) + identity + len(list(run.sources.target.model.parameters()))
    optimizer, schedule = optimizer_states(
        flags.lr, flags.weight_decay, flags.epochs, done, count, buffers
    )
    return Content({
        "epoch": done, "arch": flags.student, "state_dict": state, "best_acc1": float(job.best),
        "optimizer": optimizer, "scheduler": schedule, OWN: own_entry(job, cells),
    })  # fmt: skip


def own_entry(job: Job, cells: list[Tensor]) -> dict[str, Any]:
    """What the scripts do not save: mappings, a third ring, where the run lies."""
    rings, side = job.config.prompt.rings, job.config.side
    entry: dict[str, Any] = {
        "format": FORMAT, "script": job.script, "seed": job.config.seed,
        "mappings": [mapping.cpu() for mapping in job.mappings],
        "run": str(job.out.resolve()) if job.out else "", "torch": str(torch.__version__),
        "datasets": [s.info.name for s in (job.sources.target, *job.sources.providers)],
    }  # fmt: skip
    if len(rings) > 2:
        name, inner, outer = RING_NAMES[2], rings[1], rings[2]
        entry["state_dict_son"] = {
            f"{name}.program": square(cells[2], inner, outer),
            f"{name}.mask": mask(inner, outer),
        }
    return {**entry, "side": side}


def momentum_squares(run: Run) -> list[Tensor]:
    """SGD's buffers as squares; none before the first step."""
    sides, squares = (run.config.side, *run.config.prompt.rings), []
    for k, cells in enumerate(run.trained):
        buffer = run.optimizer.state.get(cells, {}).get("momentum_buffer")
        if buffer is None:
            return []
        squares.append(square(buffer, sides[k], sides[k + 1]))
    return squares
