"""No time without a right result: what an engine gives, held against the reference.

The tolerances are the tests' own.
"""

from __future__ import annotations

from typing import Any

import torch
from tolerances import ENGINES
from torch import Tensor

from kiop_fast.synthesize import TERMS, Synthesised

# Adam divides by the size of a gradient and so amplifies rounding from step to step: terms are
# held to the tolerance in the first step, totals in the first two; after that single-precision
# runs part, whoever computes them (the tests follow whole runs in double precision).
STEPS = 2


def tolerance(precision: str) -> float:
    """Relative, of every loss term."""
    return ENGINES["tf32" if precision == "default" else precision]


def check_synthesis(ours: Synthesised, theirs: Synthesised, precision: str) -> None:
    """Losses of the first steps; images and features of the chosen one, if that is the first."""
    check_losses(ours.losses, theirs.losses, precision)
    assert torch.equal(ours.targets.cpu(), theirs.targets.cpu())
    if ours.best_step == theirs.best_step == 0:
        away = (ours.images.cpu().int() - theirs.images.cpu().int()).abs().max()
        assert away <= 1, f"images differ by {away} of 255"  # truncation may fall on either side
        _check_gap("features", ours.features, theirs.features, tolerance(precision))


def check_losses(ours: Tensor, theirs: Tensor, precision: str) -> None:
    """(steps, terms) of a synthesis: every term of the first step, the totals of the first two."""
    _check_columns(ours[:1], theirs[:1], TERMS, tolerance(precision))
    _check_columns(ours[:STEPS, -1:], theirs[:STEPS, -1:], ["total"], tolerance(precision))
    assert ours.isfinite().all()


def check_storing(ours: Tensor, theirs: Tensor, precision: str) -> None:
    """Both terms' losses of the first steps."""
    terms = ours.shape[1] // 2
    names = [f"KL of term {k}" for k in range(terms)]
    _check_columns(ours[:STEPS, :terms], theirs[:STEPS, :terms], names, tolerance(precision))
    assert ours.isfinite().all()


def check_epoch(ours: dict[str, Any], theirs: dict[str, Any], precision: str) -> None:
    """An epoch's losses, synthesis by step, storing as a whole."""
    assert ours["losses"].keys() == theirs["losses"].keys()
    for name, expected in theirs["losses"].items():
        found = ours["losses"][name]
        if name == "storing":
            check_storing(found, expected, precision)
        else:
            check_losses(found, expected, precision)


def check_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest difference over the largest magnitude."""
    _check_gap(what, ours, theirs, tolerance)


def _check_columns(ours: Tensor, theirs: Tensor, names: Any, tolerance: float) -> None:
    for column, name in enumerate(names):
        torch.testing.assert_close(
            ours[:, column].cpu(), theirs[:, column].cpu(), rtol=tolerance, atol=tolerance * 1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def _check_gap(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    size = theirs.abs().max().clamp(min=1e-30)
    gap = float((ours - theirs).abs().max() / size)
    assert gap <= tolerance, f"{what} differ by {gap:.2e} of the largest, allowed {tolerance:.0e}"
