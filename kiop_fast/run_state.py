"""Everything that the next epoch of a run depends on, as tensors for a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from kiop_fast.run import Run
from kiop_fast.runtime.state import (
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_tensors,
)


def run_state(run: Run) -> dict[str, Tensor]:
    """Everything that the next epoch depends on, apart from the banks."""
    tensors = module_tensors((run.prompt or run.student), "model")  # type: ignore[arg-type]
    tensors |= optimizer_tensors(run.optimizer, "sgd")
    for task in reversed(run.tasks):  # offload: begin with who is present, end with who is next
        if task.mapping is not None:
            tensors[f"{task.name}.mapping"] = task.mapping
        if task.synthesizer is not None:
            task.enter()
            head = module_tensors(task.synthesizer.head, f"{task.name}.head")
            head |= optimizer_tensors(task.synthesizer.head_optimizer, f"{task.name}.adam")
            # Copied now: the next task's may take their place on the device.
            tensors |= {name: value.cpu() for name, value in head.items()}
        if task.start is not None:
            tensors |= task.start.tensors(f"{task.name}.start")
    return tensors


def restore(
    run: Run, tensors: Mapping[str, Tensor],
    bank: Callable[[str], Iterable[Mapping[str, Tensor]]],
) -> None:  # fmt: skip
    """Continue from :func:`run_state` and the banks on disk."""
    load_module((run.prompt or run.student), tensors, "model")  # type: ignore[arg-type]
    load_optimizer(run.optimizer, tensors, "sgd")
    for task in run.tasks:
        if task.mapping is not None:
            task.mapping.copy_(tensors[f"{task.name}.mapping"])
        if task.synthesizer is None:
            continue
        task.enter()
        load_module(task.synthesizer.head, tensors, f"{task.name}.head")
        load_optimizer(task.synthesizer.head_optimizer, tensors, f"{task.name}.adam")
        if task.start is not None:
            task.start.load(tensors, f"{task.name}.start")
        for made in bank(task.name):
            task.bank.add(made["images"], made["targets"])
            task.synthesizer.features.add(made["features"])
