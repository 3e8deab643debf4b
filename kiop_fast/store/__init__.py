"""The knowledge storing period: the transfer loss moves the prompt's cells."""

from kiop_fast.store.draws import (
    StoringDraws,
    draw_storing,
    in_drawn_colours,
    learning_rate,
)
from kiop_fast.store.period import Storing, store
from kiop_fast.store.terms import (
    Bank,
    Term,
    TransferLoss,
    core_loss,
    provider_loss,
    vanilla_loss,
)

__all__ = [
    "Bank",
    "Storing",
    "StoringDraws",
    "Term",
    "TransferLoss",
    "core_loss",
    "draw_storing",
    "in_drawn_colours",
    "learning_rate",
    "provider_loss",
    "store",
    "vanilla_loss",
]
