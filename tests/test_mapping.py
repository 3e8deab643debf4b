"""Label mappings: random, counted, and the one that the transfer loss chooses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kiop_fast.errors import MappingError
from kiop_fast.prompt import (
    bank_mapping,
    count_table,
    disjoint_mappings,
    frequency_mapping,
    likelihood_mapping,
    random_mapping,
)
from kiop_fast.runtime import draws


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transfer_loss(
    target: Tensor, provider: Tensor, mapping: Tensor, temperature: float, shift: float = 0.5
) -> float:
    """KL(provider ‖ mapped target) at that temperature, by torch's own function, in fp64."""
    moved = target.double() - shift * target.double().mean(0)
    seen = (moved[:, mapping] / temperature).log_softmax(1)
    return float(
        F.kl_div(seen, (provider.double() / temperature).softmax(1), reduction="batchmean")
    )


def one_move_away(mapping: Tensor, classes: int) -> list[Tensor]:
    """Every mapping that differs by one exchange, or by one class that takes a free one."""
    moved = []
    for t, u in itertools.combinations(range(len(mapping)), 2):
        other = mapping.clone()
        other[[t, u]] = mapping[[u, t]]
        moved.append(other)
    for t, s in itertools.product(range(len(mapping)), set(range(classes)) - set(mapping.tolist())):
        other = mapping.clone()
        other[t] = s
        moved.append(other)
    return moved


def test_frequency_mapping_by_hand() -> None:
    """Largest first; ties to the lowest s, then t; class 3 is absent and takes the lowest free."""
    table = torch.tensor([[5, 5, 0, 0], [5, 9, 0, 0], [0, 8, 0, 0], [1, 0, 2, 0], [0, 0, 2, 0]])
    # 9 at (1,1); 5 at (0,0) [8 at (2,1) is gone with column 1]; 2 at (3,2); class 3 takes row 2.
    assert frequency_mapping(table).tolist() == [0, 1, 3, 2]


def test_frequency_mapping_ties() -> None:
    assert frequency_mapping(torch.ones(4, 3, dtype=torch.int64)).tolist() == [0, 1, 2]
    assert frequency_mapping(torch.zeros(4, 3, dtype=torch.int64)).tolist() == [0, 1, 2]


def test_frequency_mapping_needs_enough_classes() -> None:
    with pytest.raises(MappingError, match=r"(?s)3 classes.*4 classes"):
        frequency_mapping(torch.ones(3, 4, dtype=torch.int64))


def test_count_table() -> None:
    table = count_table(torch.tensor([2, 2, 0]), torch.tensor([1, 1, 0]), (3, 2))
    assert table.tolist() == [[1, 0], [0, 0], [0, 2]]


def test_random_mappings_are_injective_and_named_by_their_draw() -> None:
    one = random_mapping(draws.generator(0, 0, "digits", "mapping"), 26, 10)
    two = random_mapping(draws.generator(0, 0, "digits", "mapping"), 26, 10)
    assert one.unique().numel() == 10
    assert torch.equal(one, two)
    assert not torch.equal(one, random_mapping(draws.generator(1, 0, "digits", "mapping"), 26, 10))


def test_disjoint_mappings_share_no_class() -> None:
    parts = disjoint_mappings(np.random.default_rng(0), 26, [10, 8, 8])
    assert sorted(torch.cat(parts).tolist()) == list(range(26))
    with pytest.raises(MappingError, match="disjoint"):
        disjoint_mappings(np.random.default_rng(0), 26, [10, 10, 10])


class TestLikelihood:
    @pytest.mark.parametrize("temperature", [1.0, 20.0])
    def test_finds_the_best_of_all(self, temperature: float) -> None:
        """Where the provider's classes are A's classes 4, 2 and 0, from wherever it starts."""
        target = 3 * noise(200, 6)
        provider = noise(200, 3, seed=1) + target[:, [4, 2, 0]]
        every = [torch.tensor(m) for m in itertools.permutations(range(6), 3)]
        losses = [transfer_loss(target, provider, m, temperature) for m in every]
        best = every[int(np.argmin(losses))]
        assert best.tolist() == [4, 2, 0]
        for start in every:
            assert likelihood_mapping(target, provider, start, temperature).equal(best)

    @settings(deadline=None, derandomize=True)
    @given(
        st.integers(1, 7), st.integers(0, 4), st.integers(1, 40), st.floats(0.1, 30.0),
        st.sampled_from([(1.0, 0.0), (4.0, 0.0), (4.0, 0.5)]), st.integers(0, 99),
    )  # fmt: skip
    def test_no_move_lowers_the_loss_and_the_start_is_no_better(
        self, classes: int, more: int, rows: int, size: float, setting: tuple[float, float],
        seed: int,
    ) -> None:  # fmt: skip
        target = size * noise(rows, classes + more, seed=seed)
        provider = size * noise(rows, classes, seed=seed + 100)
        start = torch.arange(classes)
        found = likelihood_mapping(target, provider, start, *setting)
        assert found.unique().numel() == classes
        assert start.equal(torch.arange(classes)), "the start is not changed"
        loss = transfer_loss(target, provider, found, *setting)
        assert loss <= transfer_loss(target, provider, start, *setting) + 1e-7
        for other in one_move_away(found, classes + more):
            assert loss <= transfer_loss(target, provider, other, *setting) + 1e-7

    def test_only_mapped_classes_compete(self) -> None:
        """A calls everything 0; behind that 1 and 2 tell the provider's classes apart."""
        labels = torch.arange(8) % 2
        target = torch.zeros(8, 3)
        target[:, 0] = 9
        target[labels == 0, 1] = 5
        target[labels == 1, 2] = 5
        provider = 5 * F.one_hot(labels).float()
        assert bank_mapping("iterative", target, provider).tolist() == [0, 1]
        assert bank_mapping("likelihood", target, provider).tolist() == [1, 2]

    def test_logits_of_any_size(self) -> None:
        target = 1e5 * noise(50, 8)
        provider = torch.where(noise(50, 4, seed=1) > 1, 0.0, -torch.inf)
        provider[:, 0] = 0
        assert likelihood_mapping(target, provider, torch.arange(4)).unique().numel() == 4
        target[:, 4:] = target[:, :4]  # ties, at a size where differences are all rounding
        huge = likelihood_mapping(1e4 * target, provider, torch.arange(4))
        assert huge.unique().numel() == 4

    def test_starts_where_it_is_told(self) -> None:
        """By default from the count; two minima here, the nearer one is found."""
        target, provider = 2 * noise(12, 6), 2 * noise(12, 4, seed=1)
        counted = bank_mapping("frequency", target, provider)
        table = count_table(target.argmax(1), provider.argmax(1), (6, 4))
        assert counted.equal(frequency_mapping(table))
        assert bank_mapping("likelihood", target, provider).equal(
            likelihood_mapping(target, provider, counted)
        )
        starts = [torch.tensor(m) for m in itertools.permutations(range(6), 4)]
        ends = {tuple(bank_mapping("likelihood", target, provider, s).tolist()) for s in starts}
        assert len(ends) > 1
        for end in ends:
            kept = torch.tensor(end)
            assert bank_mapping("likelihood", target, provider, kept).equal(kept)

    def test_a_long_bank_is_looked_at_evenly(self) -> None:
        target, provider = noise(5000, 5), noise(5000, 3, seed=1)
        start = torch.arange(3)
        found = likelihood_mapping(target, provider, start)
        assert found.equal(likelihood_mapping(target[::5], provider[::5], start))
