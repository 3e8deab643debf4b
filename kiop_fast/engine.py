"""The two engines: the same periods from the same draws, made for speed or made as upstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Engine:
    """The parts in which ``fast`` and ``reference`` differ; both sides have the same signatures.

    ``image_bank(channels, side, device, folder)``: only the reference engine uses the folder.
    """

    name: str
    image_bank: Callable[..., Any]
    synthesizer: Callable[..., Any]
    prompted: Callable[..., Any]
    core_loss: Callable[..., Any]
    provider_loss: Callable[..., Any]
    vanilla_loss: Callable[..., Any]
    store: Callable[..., Any]


def engine(name: str) -> Engine:
    """The engine by its name, ``fast`` or ``reference``."""
    if name == "reference":
        from kiop_fast import reference

        return Engine(
            name,
            reference.ImageBank,
            reference.Synthesizer,
            reference.ReferencePromptedModel,
            reference.core_loss,
            reference.provider_loss,
            reference.vanilla_loss,
            reference.store,
        )
    from kiop_fast import store, synthesize
    from kiop_fast.prompt import PromptedModel

    return Engine(
        name,
        lambda channels, side, device, folder: synthesize.ImageBank(channels, side, device),
        synthesize.Synthesizer,
        PromptedModel,
        store.core_loss,
        store.provider_loss,
        store.vanilla_loss,
        store.store,
    )
