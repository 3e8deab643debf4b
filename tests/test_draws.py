"""Randomness is data: named draws, their shapes, ranges and distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from kiop_fast.runtime import draws


def rng(purpose: str = "test") -> np.random.Generator:
    return draws.generator(0, 0, "task", purpose)


def test_a_draw_depends_on_its_name_only() -> None:
    first = draws.generator(3, 1, "digits", "latent").random(4)
    draws.generator(3, 1, "digits", "targets").random(100)
    again = draws.generator(3, 1, "digits", "latent").random(4)
    assert first.tolist() == again.tolist()
    names = [(3, 1, "digits", "latent"), (4, 1, "digits", "latent"), (3, 2, "digits", "latent"),
             (3, 1, "letters", "latent"), (3, 1, "digits", "flip"), (31, 1, "", "latent"),
             (3, 11, "", "latent")]  # fmt: skip
    assert len({draws.generator(*name).random() for name in names}) == len(names)


def test_named_draws_stay_what_they_are() -> None:
    """Saved runs resume only while the numbers behind a name do not change."""
    words = draws.generator(0, 0, "digits", "latent").integers(0, 1 << 30, 3)
    assert words.tolist() == [886317098, 324953762, 273547726]


def test_crop_corners_are_uniform() -> None:
    corners = draws.crop_offsets(rng(), (50, 200), 2)
    assert corners.shape == (50, 200, 2)
    counts = corners.flatten().bincount()
    assert len(counts) == 5  # 0 … 2·pad
    assert (counts.double() / counts.sum() - 0.2).abs().max() < 0.01


def test_flips() -> None:
    assert draws.flips(rng(), (30, 100), 0.5).double().mean().sub(0.5).abs() < 0.03
    assert not draws.flips(rng(), (5, 5), 0.0).any()
    assert draws.flips(rng(), (5, 5), 1.0).all()


def test_boxes_are_distributed_as_torchvisions() -> None:
    scale, ratio, side, count = (0.25, 1.0), (3 / 4, 4 / 3), 32, 4000
    ours = draws.resized_crop_boxes(rng(), (40, 100), side, scale, ratio).view(-1, 4)
    torch.manual_seed(0)
    image = torch.empty(3, side, side)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    )
    top, left, height, width = ours.T
    assert ours.min() >= 0
    assert height.min() >= 1
    assert (top + height).max() <= side
    assert (left + width).max() <= side
    for ours_, theirs_ in [
        (ours.double(), theirs.double()),
        ((height * width)[:, None].double(), (theirs[:, 2] * theirs[:, 3])[:, None].double()),
        ((width / height)[:, None].log(), (theirs[:, 3] / theirs[:, 2])[:, None].log()),
    ]:
        error = (ours_.var(0) / count + theirs_.var(0) / count).sqrt()
        assert ((ours_.mean(0) - theirs_.mean(0)).abs() < 4 * error).all()
        assert (ours_.std(0) / theirs_.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("ratio", "size"),
    [((2.0, 2.0), (4, 8)), ((0.25, 0.5), (8, 4)), ((100.0, 101.0), (1, 8))],
)
def test_a_box_that_never_fits_becomes_the_largest_of_an_allowed_ratio(
    ratio: tuple[float, float], size: tuple[int, int]
) -> None:
    """The whole area at such a ratio is wider or higher than the image (8 pixels)."""
    top, left, height, width = (
        draws.resized_crop_boxes(rng(), (3, 5), 8, (1.0, 1.0), ratio).view(-1, 4).unbind(1)
    )
    assert set(zip(height.tolist(), width.tolist(), strict=True)) == {size}
    assert int((top + height).max()) <= 8
    assert int((left + width).max()) <= 8


def test_permutations_cover_the_bank_before_repeating() -> None:
    order = draws.permutation_batches(rng(), 7, 4, 10)  # batches cross the permutations
    assert order.shape == (7, 4)
    flat = order.flatten()
    assert sorted(flat[:10].tolist()) == sorted(flat[10:20].tolist()) == list(range(10))
    assert flat[:10].tolist() != flat[10:20].tolist()
    assert len(set(flat[20:].tolist())) == 8
    small = draws.permutation_batches(rng(), 2, 6, 4)  # a bank smaller than a batch
    assert sorted(small.flatten()[:4].tolist()) == list(range(4))


def test_targets() -> None:
    even = draws.sorted_targets(rng(), 10, 4, balanced=True)
    assert sorted(even.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    free = draws.sorted_targets(rng(), 4000, 4, balanced=False)
    assert (free.diff() >= 0).all()
    assert (free.bincount(minlength=4) - 1000).abs().max() < 150


def test_negatives() -> None:
    assert draws.negative_rows(rng(), 3, 10, 10) is None
    rows = draws.negative_rows(rng(), 200, 11, 10)
    assert rows is not None
    assert rows.shape == (200, 10)
    assert all(len(set(row)) == 10 for row in rows.tolist())
    counts = rows.flatten().bincount(minlength=11)
    assert counts.min() > 150  # every row is left out now and then, none always
    assert counts.max() < 200


def test_channel_orders_are_uniform() -> None:
    orders = draws.channel_orders(rng(), (60, 100)).view(-1, 3)
    assert (orders.sort(1)[0] == torch.arange(3)).all()
    counts = (orders @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 120
