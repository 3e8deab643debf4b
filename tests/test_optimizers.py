"""Optimisers whose state is made at once: torch's numbers, in the layout fused steps ask for."""

from __future__ import annotations

import torch
from stand_ins import wave

from kiop_fast.runtime import optimizers
from kiop_fast.runtime.state import load_optimizer, optimizer_tensors


def test_adam_and_sgd_are_torchs(double: None) -> None:
    """The optimisers with state made at once follow torch's default ones."""
    ours = [wave(5, 3).requires_grad_(), wave(4, 3, 2, 2).requires_grad_()]
    ours[1].data = ours[1].data.contiguous(memory_format=torch.channels_last)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    pairs = [
        (optimizers.adam(ours, 0.1, (0.5, 0.999)), torch.optim.Adam(theirs, 0.1, (0.5, 0.999))),
        (
            optimizers.sgd(ours, 0.1, 0.9, 0.01),
            torch.optim.SGD(theirs, 0.1, 0.9, weight_decay=0.01),
        ),
    ]
    for one, other in pairs:
        for k in range(4):
            optimizers.set_gradients(sum((p**2).sum() * (k + 1) for p in ours), ours)  # type: ignore[arg-type]
            for p in theirs:
                p.grad = 2 * (k + 1) * p.detach()
            one.step()
            other.step()
            for p, q in zip(ours, theirs, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    optimizers.restart(pairs[0][0])
    assert all((value == 0).all() for value in optimizers.state_tensors(pairs[0][0]))
    optimizers.set_rate(pairs[1][0], 0.25)
    assert pairs[1][0].param_groups[0]["lr"] == 0.25


def test_gradients_take_the_layout_of_their_parameter() -> None:
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizers.set_gradients((weight * torch.arange(48.0).view(4, 3, 2, 2)).sum(), [weight])
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    assert torch.equal(weight.grad, torch.arange(48.0).view(4, 3, 2, 2))


def test_a_step_lets_go_of_its_gradients() -> None:
    weight = wave(3).requires_grad_()
    optimizer = optimizers.sgd([weight], 0.5, 0.0, 0.0)  # type: ignore[list-item]
    optimizers.set_gradients((weight * torch.tensor([1.0, 2.0, 4.0])).sum(), [weight])
    optimizers.step(optimizer)
    assert torch.equal(weight.detach(), wave(3) - torch.tensor([0.5, 1.0, 2.0]))
    assert weight.grad is None


def test_loaded_moments_lie_where_they_lay() -> None:
    """Captured steps know the address, fused optimisers ask for the parameter's layout."""
    weight = wave(4, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = optimizers.sgd([weight], 0.1, 0.9, 0.0)  # type: ignore[list-item]
    moment = optimizer.state[weight]["momentum_buffer"]
    place, saved = moment.data_ptr(), wave(4, 3, 2, 2, pace=0.3)
    load_optimizer(optimizer, {"sgd.0.momentum_buffer": saved}, "sgd")
    now = optimizer.state[weight]["momentum_buffer"]
    assert now.data_ptr() == place
    assert now.stride() == weight.stride()
    assert torch.equal(optimizer_tensors(optimizer, "sgd")["sgd.0.momentum_buffer"], saved)
    fresh = torch.optim.SGD([weight], 0.1, momentum=0.9)  # nothing is there yet
    load_optimizer(fresh, {"sgd.0.momentum_buffer": saved}, "sgd")
    assert torch.equal(fresh.state[weight]["momentum_buffer"], saved)
