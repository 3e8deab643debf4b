"""Banks of synthetic images and of their features, of both engines."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from kiop_fast import reference, synthesize
from kiop_fast.engine import engine

CPU = torch.device("cpu")
ROOMS = pytest.mark.parametrize("room", ["fast", "reference"])


@ROOMS
@pytest.mark.parametrize(
    ("capacity", "batches"),
    [(8, [4, 4]), (8, [4, 4, 4]), (7, [3, 3, 3, 3]), (5, [6, 2]), (4, [9]), (3, [1] * 7)],
    ids=["exactly full", "wrapped", "not dividing", "batch too large", "far too large", "single"],
)
def test_feature_bank_is_a_ring(room: str, capacity: int, batches: list[int]) -> None:
    bank: Any = reference.FeatureBank(capacity, 2)
    if room == "fast":
        bank = synthesize.FeatureBank(capacity, 2, CPU)
    expected: deque[int] = deque(maxlen=capacity)
    count = 0
    assert bank.stored == 0
    assert stored_pairs(bank)[0].shape == (0, 2)
    for size in batches:
        numbers = torch.arange(count, count + size)
        bank.add(numbers[:, None] * torch.tensor([1.0, 10.0, 100.0, 1000.0]))
        count += size
        expected.extend(numbers.tolist())
        local, global_ = stored_pairs(bank)
        assert bank.stored == len(local) == len(global_) == len(expected)
        assert sorted(local[:, 0].int().tolist()) == list(expected)
        assert torch.equal(global_, local * 100)
        for row, number in enumerate(local[:, 0].int().tolist()):
            assert row == number % capacity
    asked = torch.tensor([2, 0])
    chosen, _ = bank.pairs(asked) if room == "reference" else bank.beside(asked)
    assert torch.equal(chosen, local[[2, 0]])


def stored_pairs(bank: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows stored, as local and global features."""
    found: tuple[torch.Tensor, torch.Tensor] = (
        bank.pairs() if isinstance(bank, reference.FeatureBank) else bank.beside(bank.stored)
    )
    return found


def test_a_batch_finds_room_before_the_rows() -> None:
    bank = synthesize.FeatureBank(4, 2, CPU, room=3)
    assert [part.shape for part in bank.beside(0)] == [(3, 2), (3, 2)]
    for start in (0, 4, 8):  # wraps
        bank.add(torch.arange(start, start + 4)[:3, None] * torch.tensor([1.0, 1.0, 100.0, 100.0]))
        for part in bank.beside(bank.stored):
            part[:3] = -1.0
    assert bank.stored == 4
    local, global_ = bank.beside(4)
    assert local.data_ptr() == bank.beside(0)[0].data_ptr(), "no copy"
    rows = bank.rows.clone()
    assert sorted(rows[:, 0].tolist()) == [6.0, 8.0, 9.0, 10.0]
    assert local.tolist() == [[-1.0, -1.0]] * 3 + rows[:, :2].tolist()
    assert torch.equal(global_[3:], 100 * local[3:])
    chosen, _ = bank.beside(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen[3:], rows[[2, 0, 2], :2])


@ROOMS
def test_image_bank_keeps_order(room: str) -> None:
    bank = engine(room).image_bank(3, 8, CPU, None)
    assert len(bank) == 0
    assert bank.images.shape == (0, 3, 8, 8)
    pictures = (torch.arange(5 * 192) * 31 % 256).view(5, 3, 8, 8).to(torch.uint8)
    bank.add(pictures[:2], torch.tensor([3, 1]))
    bank.add(pictures[2:], torch.tensor([0, 0, 2]))
    assert len(bank) == 5
    assert torch.equal(bank.images, pictures)
    assert bank.targets.tolist() == [3, 1, 0, 0, 2]


@ROOMS
def test_quantise_truncates(room: str) -> None:
    quantise = reference.quantise if room == "reference" else synthesize.quantise
    values = torch.tensor([-0.5, 0.0, 0.9999 / 255, 1.0 / 255, 0.5, 0.9999, 1.0, 1.5])
    assert quantise(values).tolist() == [0, 0, 0, 1, 127, 254, 255, 255]
