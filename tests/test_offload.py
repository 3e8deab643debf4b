"""A place that tenants have in turns: who comes back finds what it left."""

from __future__ import annotations

import pytest
import torch
from stand_ins import wave
from torch import Tensor, nn

from kiop_fast.config import RunConfig
from kiop_fast.engine import engine
from kiop_fast.runtime.offload import SharedPlace
from kiop_fast.runtime.optimizers import adam, set_gradients, state_tensors, step

CPU = torch.device("cpu")


def learner(width: int) -> tuple[nn.Linear, torch.optim.Adam]:
    layer = nn.Linear(width, 3)
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(wave(*parameter.shape, pace=0.3 + k))
    return layer, adam(layer.parameters(), 0.1)


def tensors(layer: nn.Linear, optimizer: torch.optim.Adam) -> list[Tensor]:
    return [*layer.parameters(), *state_tensors(optimizer)]


def learn(layer: nn.Linear, optimizer: torch.optim.Adam) -> None:
    loss = (layer(wave(5, layer.in_features)) - wave(5, 3, pace=2.0)).square().sum()
    set_gradients(loss, list(layer.parameters()))
    step(optimizer)


@pytest.mark.parametrize("widths", [(4, 9), (9, 4), (7, 7)])
def test_turns_change_nothing(widths: tuple[int, int]) -> None:
    """Two learners in one place, against the same two with memory of their own."""
    alone, shared = ([learner(width) for width in widths] for _ in range(2))
    place = SharedPlace(CPU)
    tenants = [place.join(tensors(*each)) for each in shared]
    places: dict[int, list[int]] = {}
    for turn in range(4):
        for k, (each, own, tenant) in enumerate(zip(shared, alone, tenants, strict=True)):
            tenant.enter()
            now = [tensor.data_ptr() for tensor in tensors(*each)]
            assert places.setdefault(k, now) == now, "captured steps know these addresses"
            for _ in range(turn):  # in the first turn nobody changes anything
                learn(*each)
                learn(*own)
            tenant.enter()
            for found, expected in zip(tensors(*each), tensors(*own), strict=True):
                assert torch.equal(found, expected)
    one, other = ({t.untyped_storage().data_ptr() for t in tensors(*each)} for each in shared)
    assert one == other
    assert len(one) == 1


def test_every_dtype_and_shape_lies_straight() -> None:
    given = [torch.zeros((), dtype=torch.int64), wave(3, 5).bfloat16(), wave(0, 4), wave(7)]
    copies = [tensor.clone() for tensor in given]
    place = SharedPlace(CPU)
    tenant = place.join(given)
    place.join([wave(40)]).enter()
    tenant.enter()
    for tensor, copy in zip(given, copies, strict=True):
        assert tensor.dtype == copy.dtype
        assert torch.equal(tensor, copy)
        assert tensor.storage_offset() * tensor.element_size() % 512 == 0


def test_a_place_in_use_does_not_grow() -> None:
    place = SharedPlace(CPU)
    place.join([wave(300)]).enter()
    with pytest.raises(RuntimeError, match="cannot grow"):
        place.join([wave(3000)])


def test_who_waits_for_the_first_to_enter_keeps_its_shape() -> None:
    given = wave(30, 7)
    SharedPlace(CPU).join([given])
    assert given.shape == (30, 7)
    assert given.untyped_storage().nbytes() == 4


def test_only_a_gpu_has_something_to_offload() -> None:
    assert engine("fast").execution(RunConfig(offload=True), CPU)["execution"].place is None
