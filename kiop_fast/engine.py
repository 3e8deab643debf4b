"""The two engines: the same periods from the same draws, made for speed or made as upstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kiop_fast.config import RunConfig
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.offload import SharedPlace
from kiop_fast.runtime.static_step import Scratch


@dataclass(frozen=True)
class Engine:
    """The parts in which ``fast`` and ``reference`` differ; both sides have the same signatures.

    ``image_bank(channels, side, device, folder, capacity)``: only the reference engine uses the
    folder, only the fast one the capacity.  ``synthesizer`` and ``storing`` of the fast engine
    also take an :class:`~kiop_fast.runtime.execution.Execution`.
    """

    name: str
    image_bank: Callable[..., Any]
    synthesizer: Callable[..., Any]
    prompted: Callable[..., Any]
    core_loss: Callable[..., Any]
    provider_loss: Callable[..., Any]
    vanilla_loss: Callable[..., Any]
    store: Callable[..., Any]
    storing: Callable[..., Any]

    def execution(self, config: RunConfig, device: torch.device) -> dict[str, Execution]:
        """The argument that only the fast engine's ``synthesizer`` and ``storing`` take.

        Made once a run: its captured steps share stream and memory.

        Raises:
            ConfigError: the device lacks the precision.
        """
        if self.name == "reference":
            return {}
        # Dropout masks are drawn on the host, layer by layer: nothing a graph could replay.
        graphs = config.graphs and not config.prompt.dropout
        offload = config.offload and device.type == "cuda"
        execution = Execution(
            config.precision, graphs, config.compile, Scratch(device, frugal=offload),
            place=SharedPlace(device) if offload else None,
        )  # fmt: skip
        execution.check(device)
        return {"execution": execution}


def engine(name: str) -> Engine:
    """The engine by its name, ``fast`` or ``reference``."""
    if name == "reference":
        from kiop_fast import reference

        return Engine(
            name,
            _reference_bank,
            reference.Synthesizer,
            reference.ReferencePromptedModel,
            reference.core_loss,
            reference.provider_loss,
            reference.vanilla_loss,
            reference.store,
            reference.Storing,
        )
    from kiop_fast import store, synthesize
    from kiop_fast.prompt import PromptedModel

    return Engine(
        name,
        lambda channels, side, device, folder, capacity=0: synthesize.ImageBank(
            channels, side, device, capacity
        ),
        synthesize.Synthesizer,
        PromptedModel,
        store.core_loss,
        store.provider_loss,
        store.vanilla_loss,
        store.store,
        store.Storing,
    )


def _reference_bank(*place: Any, capacity: int = 0, **options: Any) -> Any:
    from kiop_fast import reference

    return reference.ImageBank(*place, **options)
