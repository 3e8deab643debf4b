"""What the tests of info_nce share: banks of many sizes, torch's loss, and what holds for any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from oracle import DEVICE, draw, results
from torch import Tensor
from torch.nn import functional as F

OP = torch.ops.kiop_fast.info_nce
# name: queries, keys, width, temperature, number of keys that count (None: all)
CASES: dict[str, tuple[int, int, int, float, int | None]] = {
    "power of two": (64, 128, 32, 0.6, None),
    "empty bank": (10, 10, 16, 0.6, None),
    "odd": (43, 100, 31, 0.1, None),
    "many shares": (10, 1000, 48, 0.6, None),
    "one query": (1, 43, 16, 0.07, None),
    "one query, one key": (1, 1, 1, 0.6, None),
    "growing bank": (100, 170, 16, 0.6, 77),
    "all keys given": (20, 100, 16, 0.6, 100),
    "more promised than there are": (20, 100, 16, 0.6, 1000),
    "nothing yet": (20, 100, 16, 0.6, 0),
}


def make(case: str) -> tuple[list[Tensor], float, Tensor | None]:
    """[queries, keys, weights] in fp64, L2-normalised; temperature; num_keys."""
    m, k, width, temperature, count = CASES[case]
    keys = F.normalize(draw(1, k, width), dim=1)
    queries = F.normalize(keys[:m] + draw(2, m, width), dim=1)
    num_keys = None if count is None else torch.tensor(count, device=DEVICE)
    return [queries, keys, draw(3, m).abs() / m], temperature, num_keys


def cross_entropy(
    queries: Tensor, keys: Tensor, weights: Tensor, temperature: float, num_keys: Tensor | None
) -> Tensor:
    """Σ w_i CE(q_i kᵀ / τ, i) over the rows and columns that count, by torch's own loss."""
    count = len(keys) if num_keys is None else min(int(num_keys), len(keys))
    queries, weights = queries[:count], weights[:count]
    if count == 0:
        return (queries.sum() + weights.sum()) * 0
    logits = queries @ keys[:count].detach().T / temperature
    target = torch.arange(len(queries), device=DEVICE)
    return (F.cross_entropy(logits, target, reduction="none") * weights).sum()


def call(
    function: Callable[..., Tensor], temperature: float, num_keys: Tensor | None
) -> Callable[..., Any]:
    return lambda q, k, w: function(q, k, temperature, w, num_keys=num_keys)


def spoil(keys: Tensor, count: int) -> Tensor:
    """Keys from ``count`` on hold NaN and infinity, as memory that nobody wrote may."""
    keys = keys.clone()
    keys[count:] = math.nan
    keys[count::2] = math.inf
    return keys


def check_ignored(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """What lies beyond num_keys, in keys, queries and weights, changes nothing."""
    (queries, keys, weights), temperature, num_keys = make("growing bank")
    clean = [queries, keys, weights]
    dirty = [spoil(x, 77) for x in clean]
    one_element = call(function, temperature, num_keys.view(1).int())
    expected = results(call(function, temperature, num_keys), clean, dtype, [0])
    for name, value in results(one_element, dirty, dtype, [0]).items():
        assert torch.equal(value, expected[name]), name
    assert expected["gradient 0"][77:].eq(0).all()


def check_extremes(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Equal keys give log K and no slope; logits of ±10⁵ give their plain difference."""
    one = torch.ones(1, 16, dtype=dtype, device=DEVICE)
    queries = one.repeat(5, 1).requires_grad_()
    loss = function(queries, one.expand(43, -1), 0.6, torch.full_like(one[0, :1], 0.2).expand(5))
    (grad,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(math.log(43), rel=1e-6)
    assert grad.abs().max() <= 4 * torch.finfo(dtype).eps
    queries = (1e5 * one / 16).requires_grad_()
    loss = function(queries, torch.cat([-one, one]), 1.0, one[0, :1])
    (grad,) = torch.autograd.grad(loss, queries)
    assert loss.item() == pytest.approx(2e5, rel=1e-6)
    torch.testing.assert_close(grad, 2 * one)


def check_property(
    data: st.DataObject, function: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    m = data.draw(st.integers(1, 70))
    k = m + data.draw(st.integers(0, 70))
    width = data.draw(st.integers(1, 33))
    count = data.draw(st.none() | st.integers(0, k + 3))
    temperature = data.draw(st.sampled_from([0.05, 0.6, 7.0]))
    scale = data.draw(st.sampled_from([0.0, 1.0, 100.0]))
    seed = data.draw(st.integers(0, 999))
    inputs = [draw(seed, m, width) * scale, draw(seed + 1, k, width), draw(seed + 2, m)]
    inputs = [x.to(dtype).double() for x in inputs]
    num_keys = None if count is None else torch.tensor(count, device=DEVICE)
    ours = results(call(function, temperature, num_keys), inputs, dtype, [0])
    exact = results(
        lambda q, k, w: cross_entropy(q, k, w, temperature, num_keys), inputs, torch.float64, [0]
    )
    # Rounding a logit of size L moves a loss by about L ulp.
    size = (inputs[0].norm(dim=1) * inputs[2].abs()).sum() * inputs[1].norm(dim=1).max()
    size = size / temperature + inputs[2].abs().sum() * math.log(k + 1)
    assert (ours["output 0"] - exact["output 0"]).abs() <= tolerance * size
    slope = (1 + size) * inputs[1].norm(dim=1).max() / temperature
    assert (ours["gradient 0"] - exact["gradient 0"]).abs().max() <= tolerance * slope
