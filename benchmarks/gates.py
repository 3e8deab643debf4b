"""No time without a right result: what an engine gives, held against the reference.

The tolerances are the tests' own.
"""

from __future__ import annotations

from typing import Any

import torch
from tolerances import ABSOLUTE, ENGINES
from torch import Tensor

from kiop_fast.synthesize import TERMS, Synthesised

# Adam divides by the size of a gradient and so amplifies rounding from step to step: terms are
# held to the tolerance in the first step, totals in the first two; after that single-precision
# runs part, whoever computes them (the tests follow whole runs in double precision).
STEPS = 2


def tolerance(precision: str) -> float:
    """Relative, of every loss."""
    return ENGINES["tf32" if precision == "default" else precision]


def absolute(precision: str) -> float:
    """Of a loss, where the relative tolerance asks for less."""
    return ABSOLUTE.get(precision, 1e-3 * tolerance(precision))


def check_synthesis(ours: Synthesised, theirs: Synthesised, precision: str) -> None:
    """Losses of the first steps; images and features of the chosen one, if that is the first."""
    check_losses(ours.losses, theirs.losses, precision)
    assert torch.equal(ours.targets.cpu(), theirs.targets.cpu())
    if ours.best_step == theirs.best_step == 0:
        away = (ours.images.cpu().int() - theirs.images.cpu().int()).abs().max()
        # Truncation may fall on either side; bf16 has 8 bits.
        assert away <= (1 if precision != "bf16" else 8), f"images differ by {away} of 255"
        _check_gap("features", ours.features, theirs.features, tolerance(precision))


def check_losses(ours: Tensor, theirs: Tensor, precision: str) -> None:
    """(steps, terms) of a synthesis: every term of the first step, the totals of the first two.

    Below fp32 an arg-max may fall on the other side, which the adversarial term counts by: it is
    then held only as a part of the total.
    """
    for column, name in enumerate(TERMS):
        if name != "adv" or precision == "fp32":
            steps = STEPS if name == "total" else 1
            _check_column(name, ours[:steps, column], theirs[:steps, column], precision)
    assert ours.isfinite().all()


def check_storing(ours: Tensor, theirs: Tensor, precision: str, temperature: float) -> None:
    """Every term's loss of the first steps.

    The reference takes T² times a difference of logarithms of order 1, so one ulp of T² is what
    rounding leaves of it in single precision, however small the loss.
    """
    terms, ulp = ours.shape[1] // 2, temperature**2 * torch.finfo(torch.float32).eps
    for column in range(terms):
        name = f"KL of term {column}"
        _check_column(name, ours[:STEPS, column], theirs[:STEPS, column], precision, ulp)
    assert ours.isfinite().all()


def check_epoch(
    ours: dict[str, Any], theirs: dict[str, Any], precision: str, temperature: float
) -> None:
    """An epoch's losses, synthesis by step, storing as a whole."""
    assert ours["losses"].keys() == theirs["losses"].keys()
    for name, expected in theirs["losses"].items():
        found = ours["losses"][name]
        if name == "storing":
            check_storing(found, expected, precision, temperature)
        else:
            check_losses(found, expected, precision)


def check_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest difference over the largest magnitude."""
    _check_gap(what, ours, theirs, tolerance)


def _check_column(
    name: str, ours: Tensor, theirs: Tensor, precision: str, least: float = 0.0
) -> None:
    torch.testing.assert_close(
        ours.cpu(), theirs.cpu(), rtol=tolerance(precision), atol=max(least, absolute(precision)),
        msg=lambda text: f"{name} at {precision}: {text}",
    )  # fmt: skip


def _check_gap(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    size = theirs.abs().max().clamp(min=1e-30)
    gap = float((ours - theirs).abs().max() / size)
    assert gap <= tolerance, f"{what} differ by {gap:.2e} of the largest, allowed {tolerance:.0e}"
