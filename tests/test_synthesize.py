"""The synthesize period: its draws, the choice of the best step, what stays frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from stand_ins import tiny_source, wave
from torch import Tensor

from kiop_fast import synthesize
from kiop_fast.config import SynthesisConfig
from kiop_fast.engine import engine
from kiop_fast.source import Source
from kiop_fast.synthesize import MetaStart, SynthesisDraws, draw_synthesis

CPU = torch.device("cpu")
ROOMS = pytest.mark.parametrize("room", ["fast", "reference"])
SMALL: dict[str, Any] = {"batch": 4, "steps": 4, "latent": 6, "width": 3, "pad": 1}


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


def system(room: str, teacher: Source, **changes: Any) -> tuple[Any, SynthesisDraws]:
    config = SynthesisConfig(**{**SMALL, **changes})
    made = engine(room).synthesizer(
        teacher, config, teacher.info, side=8, bank_rows=16, seed=0, task=teacher.name, device=CPU
    )
    drawn = draw_synthesis(config, teacher, 8, seed=0, epoch=0, task=teacher.name, call=0, stored=0)
    return made, drawn


def no_student(images: Tensor) -> Tensor:
    raise AssertionError("not asked for while adv = 0")


def test_the_head_by_its_formula() -> None:
    """normalise(relu(x W₁ᵀ + b₁) W₂ᵀ + b₂), whichever rows are constants."""
    head = synthesize.ProjectionHead(5, 4, 3)
    x = wave(6, 5).requires_grad_()
    hidden = (x @ head.first.weight.T + head.first.bias).clamp(min=0)
    expected = hidden @ head.second.weight.T + head.second.bias
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(x), expected)
    rows = torch.cat([torch.full((2, 5), torch.nan), x[2:].detach()])
    ours = head(x[:2], rows)
    torch.testing.assert_close(ours, expected)
    learned = [x, *head.parameters()]
    (by_x, *by_head), (all_x, *all_head) = (
        torch.autograd.grad(result.sum(), learned) for result in (ours, expected)
    )
    torch.testing.assert_close(by_x[:2], all_x[:2])
    torch.testing.assert_close(by_head, all_head)


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
def test_a_shared_start_moves_towards_what_a_call_learned(room: str) -> None:
    """Reptile: w ← w + rate (learned − w); the first call starts from its own draws."""
    made, drawn = system(room, tiny_source("t", 5, 0), adv=0.0, start="meta", meta_steps=2)
    start = MetaStart(0.25)
    for call in range(2):
        begun = start.begin(drawn)
        before = {name: value.clone() for name, value in begun.weights.items()}
        if call == 0:
            assert begun is drawn
        made.synthesize(begun, no_student, None)
        start.end(begun, made.generator)
        for name, learned in made.generator.named_parameters():
            expected = before[name] + 0.25 * (learned.detach() - before[name])
            torch.testing.assert_close(start.weights[name], expected)
            assert not torch.equal(learned, before[name])
    again = MetaStart(0.25)
    again.load(start.tensors("digits.start"), "digits.start")
    assert again.weights.keys() == start.weights.keys()


def test_later_calls_take_fewer_steps() -> None:
    teacher = tiny_source("t", 5, 0)
    config = SynthesisConfig(batch=3, steps=5, latent=4, width=2, start="meta", meta_steps=2)
    for start, lengths in (("meta", [5, 2, 2]), ("fresh", [5, 5, 5])):
        changed = dataclasses.replace(config, start=start)
        drawn = [
            draw_synthesis(
                changed, teacher, 8, seed=0, epoch=epoch, task="t", call=call, stored=0
            )
            for epoch, call in ((0, 0), (0, 1), (1, 0))
        ]  # fmt: skip
        assert [one.steps for one in drawn] == lengths
        assert [len(one.views.box) for one in drawn] == lengths


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
