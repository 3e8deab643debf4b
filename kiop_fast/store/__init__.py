"""The knowledge storing period: the transfer loss moves the prompt's cells."""

from kiop_fast.store.draws import (
    StoringDraws,
    augmentation,
    draw_storing,
    in_drawn_colours,
    learning_rate,
)
from kiop_fast.store.period import Storing, store
from kiop_fast.store.terms import (
    Bank,
    Imitation,
    Term,
    core_loss,
    provider_loss,
    vanilla_loss,
)

__all__ = [
    "Bank",
    "Imitation",
    "Storing",
    "StoringDraws",
    "Term",
    "augmentation",
    "core_loss",
    "draw_storing",
    "in_drawn_colours",
    "learning_rate",
    "provider_loss",
    "store",
    "vanilla_loss",
]
