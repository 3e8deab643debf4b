"""The synthesize period: its draws, its banks, the choice of the best step, what stays frozen."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import tiny_source, wave
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from kiop_fast import reference, synthesize
from kiop_fast.config import SynthesisConfig
from kiop_fast.engine import engine
from kiop_fast.runtime import draws
from kiop_fast.source import Source
from kiop_fast.synthesize import SynthesisDraws, draw_synthesis

CPU = torch.device("cpu")
ROOMS = pytest.mark.parametrize("room", ["fast", "reference"])
SMALL: dict[str, Any] = {"batch": 4, "steps": 4, "latent": 6, "width": 3, "pad": 1}


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


def test_a_box_that_never_fits_becomes_the_whole_image() -> None:
    boxes = draws.resized_crop_boxes(rng(), (3, 5), 8, (1.0, 1.0), (100.0, 101.0))
    assert boxes.view(-1, 4).tolist() == [[0, 0, 8, 8]] * 15


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


def test_draws_of_a_call() -> None:
    teacher = tiny_source("t", 5, 0)
    config = SynthesisConfig(**{**SMALL, "negatives": 3})

    def drawn(epoch: int = 0, call: int = 0, stored: int = 8) -> SynthesisDraws:
        return draw_synthesis(config, teacher, 8, seed=1, epoch=epoch, task="t", call=call,
                              stored=stored)  # fmt: skip

    one = drawn()
    assert one.z.shape == (4, 6)
    assert one.targets.shape == (4,)
    assert one.views.crop.shape == (4, 4, 2)
    assert one.views.box.shape == (4, 4, 4)
    assert one.negatives is not None
    assert one.negatives.shape == (4, 3)
    assert drawn(stored=3).negatives is None
    assert torch.equal(one.z, drawn(stored=3).z)
    for other in (drawn(epoch=1), drawn(call=1)):
        assert not torch.equal(one.z, other.z)
        assert not torch.equal(one.views.box, other.views.box)
    assert {name for name, w in one.weights.items() if not w.any()} == {
        name for name in one.weights if name.endswith("bias")
    }
    wide = draw_synthesis(SynthesisConfig(), teacher, 32, seed=1, epoch=0, task="t", call=0,
                          stored=0).weights  # fmt: skip
    assert wide["project.weight"].std().sub(0.02).abs() < 1e-4
    assert wide["blocks.0.weight"].mean().sub(1).abs() < 0.01


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
    assert bank.pairs()[0].shape == (0, 2)
    for size in batches:
        numbers = torch.arange(count, count + size)
        bank.add(numbers[:, None] * torch.tensor([1.0, 10.0, 100.0, 1000.0]))
        count += size
        expected.extend(numbers.tolist())
        local, global_ = bank.pairs()
        assert bank.stored == len(local) == len(global_) == len(expected)
        assert sorted(local[:, 0].int().tolist()) == list(expected)
        assert torch.equal(global_, local * 100)
        for row, number in enumerate(local[:, 0].int().tolist()):
            assert row == number % capacity
    chosen, _ = bank.pairs(torch.tensor([2, 0]))
    assert torch.equal(chosen, bank.pairs()[0][[2, 0]])


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


def system(room: str, teacher: Source, **changes: Any) -> tuple[Any, SynthesisDraws]:
    config = SynthesisConfig(**{**SMALL, **changes})
    made = engine(room).synthesizer(
        teacher, config, teacher.info, side=8, bank_rows=16, seed=0, task=teacher.name, device=CPU
    )
    drawn = draw_synthesis(config, teacher, 8, seed=0, epoch=0, task=teacher.name, call=0, stored=0)
    return made, drawn


def no_student(images: Tensor) -> Tensor:
    raise AssertionError("not asked for while adv = 0")


@ROOMS
def test_the_best_step_is_the_first_with_the_lowest_total(room: str) -> None:
    teacher = tiny_source("t", 5, 0)
    made, drawn = system(room, teacher, adv=0.0, steps=8, lr=0.3)
    totals = []
    result = made.synthesize(drawn, no_student, None, lambda k, total: totals.append((k, total)))
    column = result.losses[:, synthesize.TERMS.index("total")]
    assert [k for k, _ in totals] == list(range(1, 9))
    assert torch.equal(column, torch.stack([total for _, total in totals]))
    assert result.best_step == int(column.argmin())
    assert 0 < result.best_step < 7  # the rate is high enough for the loss to rise again
    config = made.config
    weighted = result.losses[:, :4] @ torch.tensor([config.bn, config.oh, config.adv, config.cr])
    torch.testing.assert_close(column, weighted)
    shorter, _ = system(room, teacher, adv=0.0, steps=result.best_step + 1, lr=0.3)
    cut = shorter.synthesize(drawn, no_student, None)
    assert torch.equal(cut.images, result.images)
    assert torch.equal(cut.features, result.features)


@ROOMS
def test_ties_keep_the_first(room: str) -> None:
    made, drawn = system(room, tiny_source("t", 5, 0), adv=0.0, bn=0.0, oh=0.0, cr=0.0)
    result = made.synthesize(drawn, no_student, None)
    assert not result.losses[:, -1].any()
    assert result.best_step == 0


@ROOMS
def test_nan_never_replaces_the_best(room: str) -> None:
    made, drawn = system(room, tiny_source("t", 5, 0), adv=0.0)

    def poison(done: int, total: Tensor) -> None:
        if done == 2:
            with torch.no_grad():
                made.generator.project.weight.fill_(torch.nan)

    result = made.synthesize(drawn, no_student, None, poison)
    assert result.losses[:2].isfinite().all()
    assert result.losses[2:, -1].isnan().all()
    assert result.best_step == int(result.losses[:2, -1].argmin())
    assert result.features.isfinite().all()
    assert result.images.float().std() > 0


@ROOMS
def test_a_call_depends_on_its_draws_alone(room: str) -> None:
    """The generator's running statistics and old weights leave no trace in the next call."""
    teacher = tiny_source("t", 5, 0)
    made, drawn = system(room, teacher, adv=0.0, cr=0.0)
    first = made.synthesize(drawn, no_student, None)
    again = made.synthesize(drawn, no_student, None)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.losses, again.losses)
    assert made.features.added == 8


@ROOMS
def test_the_head_persists_and_rests_without_its_term(room: str) -> None:
    teacher = tiny_source("t", 5, 0)
    made, drawn = system(room, teacher, adv=0.0, cr=0.0)
    before = [p.detach().clone() for p in made.head.parameters()]
    made.synthesize(drawn, no_student, None)
    assert all(torch.equal(p, q) for p, q in zip(made.head.parameters(), before, strict=True))
    made, drawn = system(room, teacher, adv=0.0)
    made.synthesize(drawn, no_student, None)
    steps = [state["step"].item() for state in made.head_optimizer.state.values()]
    assert steps == [4.0] * 4
    made.synthesize(drawn, no_student, None)
    steps = [state["step"].item() for state in made.head_optimizer.state.values()]
    assert steps == [8.0] * 4


@ROOMS
def test_the_teacher_may_be_the_student(room: str) -> None:
    """Task A: nothing of the student's pass reaches the teacher's features or statistics."""
    target = tiny_source("a", 6, 3)
    alone, drawn = system(room, target, adv=0.0, steps=1)
    expected = alone.synthesize(drawn, no_student, None)
    calls = []

    def student(images: Tensor) -> Tensor:
        calls.append(images.shape)
        with torch.no_grad():
            target.model(images.flip(2) * 3)
        return target.model(images)

    made, drawn = system(room, target, adv=0.5, steps=1)
    result = made.synthesize(drawn, student, None)
    assert calls == [(4, 3, 8, 8)]
    assert torch.equal(result.features, expected.features)
    assert torch.equal(result.losses[:, :2], expected.losses[:, :2])
    # A agrees with itself on every row, so the divergence is 0.
    assert result.losses[0, 2].abs() < 1e-6


@ROOMS
def test_sources_stay_frozen(room: str) -> None:
    teacher, target = tiny_source("t", 5, 0), tiny_source("a", 6, 3)
    made, drawn = system(room, teacher)
    made.synthesize(drawn, target.model, torch.tensor([1, 0, 3, 2, 5]))
    for source in (teacher, target):
        source.check_unchanged()
        assert all(p.grad is None and not p.requires_grad for p in source.model.parameters())
        assert all("forward" not in vars(m) for m in source.model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in source.model.modules())


def test_taps_come_off_when_the_teacher_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_source("t", 5, 0)
    made, drawn = system("fast", teacher, adv=0.0)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(teacher.model.classify, "forward", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        made.synthesize(drawn, no_student, None)
    monkeypatch.undo()
    assert all("forward" not in vars(m) for m in teacher.model.modules())
    assert teacher.model(wave(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(("channels", "grey", "made"), [(1, True, 1), (1, False, 3), (3, True, 3)])
def test_generator_channels(channels: int, grey: bool, made: int) -> None:
    teacher = tiny_source("t", 5, 0, channels=channels)
    for room in ("fast", "reference"):
        built, drawn = system(room, teacher, grey=grey, adv=0.0)
        assert built.synthesize(drawn, no_student, None).images.shape == (4, made, 8, 8)
