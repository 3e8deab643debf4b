"""What the tests of mapped_kl share: logits of many shapes, edges, and what holds for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import DEVICE, draw
from torch import Tensor

OP = torch.ops.kiop_fast.mapped_kl
MAPPED_KL = Callable[..., tuple[Tensor, Tensor]]
# name: rows, classes of logits, classes of the target, mapping, temperature, only_agreeing
CASES: dict[str, tuple[int, int, int, str, float, bool]] = {
    "power of two": (8, 64, 16, "injective", 4.0, False),
    "43 to 10": (5, 43, 10, "injective", 20.0, False),
    "100 to 43, agreeing": (64, 100, 43, "injective", 1.0, True),
    "1000, identity": (3, 1000, 1000, "identity", 20.0, False),
    "1000 classes": (3, 1000, 1000, "injective", 4.0, True),
    "repeats": (7, 10, 100, "any", 4.0, False),
    "all from one class": (4, 10, 43, "one", 2.0, False),
    "one row, two classes": (1, 2, 2, "identity", 1.0, True),
    "several programs": (40, 100, 100, "any", 4.0, True),
    "beyond a block": (3, 9001, 8500, "injective", 4.0, False),
    "as many classes as it takes": (3, 16384, 16384, "injective", 20.0, True),
}


def make(case: str) -> tuple[list[Tensor], Tensor | None, float, bool]:
    """[logits, target_logits] in fp64, mapping, temperature, only_agreeing."""
    rows, ka, kb, kind, temperature, only_agreeing = CASES[case]
    generator = torch.Generator().manual_seed(ka * kb)
    mapping = {
        "identity": lambda: None,
        "injective": lambda: torch.randperm(ka, generator=generator)[:kb],
        "any": lambda: torch.randint(ka, (kb,), generator=generator),
        "one": lambda: torch.full((kb,), ka - 1),
    }[kind]()
    logits, target = 3 * draw(1, rows, ka), 3 * draw(2, rows, kb)
    mapping = None if mapping is None else mapping.to(DEVICE)
    # Every other row agrees, so that only_agreeing has something to count and something to drop.
    own = logits if mapping is None else logits[:, mapping]
    target[::2] = own[::2] + draw(3, rows, kb)[::2] / 2
    if kb > 8192:
        # Arg-maxima beyond the kernel's first block: equal in rows 0 and 2, a block apart in row 1.
        logits[[0, 2], mapping[8300]] = target[[0, 2], 8300] = 60
        logits[1, mapping[8]] = target[1, 8200] = 60
    return [logits, target], mapping, temperature, only_agreeing


def call(
    function: MAPPED_KL, mapping: Tensor | None, temperature: float, only_agreeing: bool
) -> Callable[[Tensor, Tensor], Any]:
    return lambda a, b: function(a, b, mapping, temperature, only_agreeing=only_agreeing)


INF = math.inf
# name: logits, target_logits, loss (T = 1), agreement
EDGES: dict[str, tuple[list[float], list[float], float, int]] = {
    "all equal": ([5.0] * 4, [-3.0] * 4, 0.0, 1),
    "huge": ([3e4, 0, 0, 0], [3e4, 0, -3e4, 0], 0.0, 1),
    "both masked": ([1, 1, -INF, -INF], [2, 2, -INF, -INF], 0.0, 1),
    "target masked": ([0, 0, 0, 0], [7, 7, -INF, -INF], math.log(2), 1),
    "one class left": ([0, -INF, -INF, -INF], [0, -INF, -INF, -INF], 0.0, 1),
    "certain and wrong": ([0, 100, -INF, 0], [100, 0, -INF, 0], 100.0, 0),
    "impossible class": ([-INF, 0, 0, 0], [0, -INF, -INF, -INF], INF, 0),
}


def check_edge(function: MAPPED_KL, edge: str, dtype: torch.dtype) -> None:
    logits, target, loss, agreement = EDGES[edge]
    leaves = [
        torch.tensor([x, x], dtype=dtype, device=DEVICE, requires_grad=True)
        for x in (logits, target)
    ]
    found = function(*leaves, None, 1.0)
    expected = torch.tensor(loss, device=DEVICE, dtype=found[0].dtype)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert found[1].item() == 2 * agreement
    if math.isfinite(loss):
        for grad in torch.autograd.grad(found[0], leaves):
            assert grad.isfinite().all()
            torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), atol=1e-5, rtol=0)


def check_property(data: st.DataObject, function: MAPPED_KL, dtype: torch.dtype) -> None:
    """Finite and the written-out sum, for any shapes, mapping and finite or masked logits."""
    rows, ka, kb = (data.draw(st.integers(low, top)) for low, top in ((1, 9), (2, 40), (2, 40)))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 4.0, 20.0]))
    mapping = data.draw(st.lists(st.integers(0, ka - 1), min_size=kb, max_size=kb))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    seed = data.draw(st.integers(0, 999))
    logits = draw(seed, rows, ka) * scale + data.draw(st.sampled_from([0.0, 1e3]))
    target = draw(seed + 1, rows, kb) * scale
    masked = data.draw(st.sets(st.integers(0, kb - 2), max_size=kb - 2))
    target[:, list(masked)] = -INF
    inputs = [logits.to(dtype), target.to(dtype)]
    wanted = torch.tensor(mapping, device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss, agreement = function(*leaves, wanted, temperature)
    grads = torch.autograd.grad(loss, leaves)

    own = inputs[0].double()[:, wanted]
    log_q, log_p = (torch.log_softmax(x.double() / temperature, 1) for x in (own, inputs[1]))
    terms = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0)
    exact = terms.sum() * temperature**2 / rows
    size = terms.abs().sum() * temperature**2 / rows + temperature**2
    assert (loss.double() - exact).abs() <= 1e-5 * size
    assert agreement.item() == (own.argmax(1) == inputs[1].argmax(1)).sum().item()
    for grad in grads:
        assert grad.isfinite().all()
        assert grad.double().sum(1).abs().max() <= 1e-4 * (1 + grad.abs().max())
