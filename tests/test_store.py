"""The knowledge storing period: its draws, its optimiser, what moves and what does not."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import tiny_source, wave
from torch import Tensor, nn

from kiop_fast import reference
from kiop_fast.config import StoringConfig
from kiop_fast.engine import engine
from kiop_fast.prompt import Prompt, frozen_logits
from kiop_fast.source import Source, fingerprint
from kiop_fast.store import (
    StoringDraws,
    Term,
    draw_storing,
    in_drawn_colours,
    learning_rate,
)

CPU = torch.device("cpu")
ROOMS = pytest.mark.parametrize("room", ["fast", "reference"])
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.3, 0.2)}


def pictures(count: int, channels: int = 3) -> Tensor:
    return (torch.arange(count * channels * 64) * 37 % 256).view(count, channels, 8, 8).byte()


def filled_bank(room: str, images: Tensor) -> Any:
    more = {"workers": 0} if room == "reference" else {}
    bank = engine(room).image_bank(images.shape[1], 8, CPU, None, **more)
    bank.add(images, torch.zeros(len(images), dtype=torch.int64))
    return bank


def batches(room: str, term: Term, drawn: StoringDraws) -> list[Tensor]:
    """The batches the term's loss is given."""
    seen: list[Tensor] = []
    weight = nn.Parameter(torch.zeros(()))

    def loss(images: Tensor) -> Any:
        seen.append(images)
        return SimpleNamespace(loss=weight * 1.0, agreement=torch.zeros((), dtype=torch.int64))

    told = Term(term.name, term.weight, term.bank, term.source, term.average_grey, loss)
    steps = len(drawn.index)
    engine(room).store([told], {term.name: drawn}, torch.optim.SGD([weight], 0.1), steps)
    return seen


def never(images: Tensor) -> Any:
    raise AssertionError


@pytest.mark.parametrize(("epochs", "lr"), [(1, 0.8), (5, 8.0), (100, 0.8)])
def test_learning_rate_is_torchs_cosine(epochs: int, lr: float) -> None:
    config = StoringConfig(lr=lr)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        theirs = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, epoch, epochs) == pytest.approx(theirs, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(config, 0, epochs) == lr
    half = learning_rate(config, epochs // 2, epochs)
    assert epochs % 2 or half == pytest.approx(lr / 2)


def test_draws_of_a_period() -> None:
    plain = tiny_source("p", 4, 0)
    cifar = tiny_source("q", 4, 0, pad=4, flip=0.5)
    config = StoringConfig(steps=6)
    drawn = draw_storing(config, plain.info, 10, 5, seed=0, epoch=0, task="p")
    assert drawn.index.shape == (6, 5)
    assert (drawn.pad, drawn.crop, drawn.flip) == (0, None, None)
    assert sorted(drawn.index[:2].flatten().tolist()) == list(range(10))
    drawn = draw_storing(config, cifar.info, 10, 5, seed=0, epoch=0, task="q")
    assert drawn.pad == 4
    assert drawn.crop is not None
    assert drawn.flip is not None
    assert drawn.crop.shape == (6, 5, 2)
    assert drawn.flip.shape == (6, 5)
    own = StoringConfig(steps=6, augment_as_dataset=False, pad=1)
    drawn = draw_storing(own, cifar.info, 10, 5, seed=0, epoch=0, task="q")
    assert drawn.pad == 1
    assert drawn.flip is None
    assert drawn.crop is not None
    assert drawn.crop.max() == 2
    later = draw_storing(own, cifar.info, 10, 5, seed=0, epoch=1, task="q")
    assert not torch.equal(drawn.index, later.index)


@ROOMS
def test_a_batch_is_gathered_padded_cropped_flipped_normalised(room: str) -> None:
    """Against the formula; black padding is put on before the normaliser, as torchvision's."""
    source, images = tiny_source("p", 4, 0, **COLOUR), pictures(5)
    drawn = StoringDraws(
        torch.tensor([[4, 0, 4], [1, 3, 2]]),
        2,
        torch.tensor([[[0, 4], [2, 2], [3, 1]], [[4, 0], [1, 1], [2, 3]]]),
        torch.tensor([[True, False, False], [False, True, True]]),
    )
    term = Term("p", 1.0, filled_bank(room, images), source, False, never)
    mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert drawn.crop is not None
    assert drawn.flip is not None
    for step, batch in enumerate(batches(room, term, drawn)):
        for k, row in enumerate(drawn.index[step].tolist()):
            top, left = drawn.crop[step, k].tolist()
            frame = torch.zeros(3, 12, 12)
            frame[:, 2:10, 2:10] = images[row] / 255
            expected = frame[:, top : top + 8, left : left + 8]
            expected = expected.flip(2) if drawn.flip[step, k] else expected
            torch.testing.assert_close(batch[k], (expected - mean) / std)


@ROOMS
def test_grey_is_repeated_and_colour_averaged(room: str) -> None:
    source = tiny_source("g", 4, 0, channels=1, mean=(0.2,) * 3, std=(0.3,) * 3)
    drawn = StoringDraws(torch.tensor([[1, 0]]), 0, None, None)
    grey, colour = pictures(2, 1), pictures(2, 3)
    term = Term("g", 1.0, filled_bank(room, grey), source, False, never)
    (batch,) = batches(room, term, drawn)
    expected = ((grey / 255 - 0.2) / 0.3)[[1, 0]].expand(-1, 3, -1, -1)
    torch.testing.assert_close(batch, expected)
    term = Term("g", 1.0, filled_bank(room, colour), source, True, never)
    (batch,) = batches(room, term, drawn)
    expected = ((colour / 255 - 0.2) / 0.3)[[1, 0]].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(batch, expected)


def setting(room: str, mapping: Tensor | None = None) -> tuple[Source, Source, Prompt, list[Term]]:
    """Target, provider, prompt and both terms, α = 2 and β = 0.5."""
    target, provider = tiny_source("a", 6, 1, **COLOUR), tiny_source("b", 4, 2, **COLOUR)
    prompt, parts = Prompt(8, (11, 16)), engine(room)
    core = parts.prompted(target, prompt, 1)
    outer = parts.prompted(target, prompt, 2, torch.tensor([5, 0, 2, 1]))
    terms = [
        Term("a", 2.0, filled_bank(room, pictures(6)), target, False,
             parts.core_loss(core, 3.0, "prompted")),
        Term("b", 0.5, filled_bank(room, 255 - pictures(7)), provider, False,
             parts.provider_loss(outer, provider, 3.0, "provider")),
    ]  # fmt: skip
    return target, provider, prompt, terms


def period(terms: list[Term], steps: int) -> dict[str, StoringDraws]:
    config = StoringConfig(steps=steps, batch=4)
    return {
        term.name: draw_storing(config, term.source.info, len(term.bank.images), 4, seed=0,
                                epoch=0, task=term.name)
        for term in terms
    }  # fmt: skip


@ROOMS
def test_two_steps_of_sgd_by_hand(room: str, double: None) -> None:
    """v ← 0.9 v + g + wd p;  p ← p − lr v, with g of the weighted sum of the terms."""
    _, _, prompt, terms = setting(room)
    lr, momentum, decay = 0.7, 0.9, 0.05
    with torch.no_grad():
        for cells in prompt.cells:
            cells.copy_(wave(*cells.shape))
    drawn = period(terms, 2)
    seen = {term.name: batches(room, term, drawn[term.name]) for term in terms}
    start = [p.detach().clone() for p in prompt.parameters()]
    values, speed, logged = [p.clone() for p in start], [torch.zeros_like(p) for p in start], []
    for step in range(2):
        with torch.no_grad():
            for cells, value in zip(prompt.parameters(), values, strict=True):
                cells.copy_(value)
        a, b = (term.loss(seen[term.name][step]).loss for term in terms)
        logged.append([a.item(), b.item()])
        gradients = torch.autograd.grad(2.0 * a + 0.5 * b, list(prompt.parameters()))
        speed = [
            momentum * v + g + decay * p
            for v, g, p in zip(speed, gradients, values, strict=True)
        ]  # fmt: skip
        values = [p - lr * v for p, v in zip(values, speed, strict=True)]
    with torch.no_grad():
        for cells, value in zip(prompt.parameters(), start, strict=True):
            cells.copy_(value)
    optimizer = torch.optim.SGD(prompt.parameters(), lr, momentum, weight_decay=decay)
    steps = []
    log = engine(room).store(
        terms, drawn, optimizer, 2, lambda k, total: steps.append((k, total.item()))
    )
    for cells, value in zip(prompt.parameters(), values, strict=True):
        torch.testing.assert_close(cells.detach(), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log[:, :2], torch.tensor(logged), rtol=1e-5, atol=1e-7)
    assert [k for k, _ in steps] == [1, 2]
    assert steps[1][1] == pytest.approx(2.0 * logged[1][0] + 0.5 * logged[1][1], rel=1e-5)


@ROOMS
def test_only_the_cells_move(room: str) -> None:
    target, provider, prompt, terms = setting(room)
    before = [p.detach().clone() for p in prompt.parameters()]
    kept = [term.bank.images.clone() for term in terms]
    drawn = period(terms, 5)
    rows = [drawn[term.name].index.clone() for term in terms]
    log = engine(room).store(terms, drawn, torch.optim.SGD(prompt.parameters(), 1.0), 5)
    assert log.shape == (5, 4)
    assert log.isfinite().all()
    assert ((log[:, 2:] * 4) % 1 == 0).all()  # shares of four rows
    assert all(not torch.equal(p, q) for p, q in zip(prompt.parameters(), before, strict=True))
    for source in (target, provider):
        source.check_unchanged()
        assert not source.model.training
        assert all(p.grad is None and not p.requires_grad for p in source.model.parameters())
    for term, images, index in zip(terms, kept, rows, strict=True):
        assert torch.equal(term.bank.images, images)
        assert torch.equal(drawn[term.name].index, index)


@ROOMS
def test_the_core_learns_through_the_targets_side(room: str) -> None:
    """KL(prompted ‖ plain) and KL(plain ‖ prompted) differ in value and in gradient."""
    target, _, prompt, _ = setting(room)
    parts = engine(room)
    core = parts.prompted(target, prompt, 1)
    images = wave(4, 3, 8, 8)
    found = {}
    for side in ("prompted", "plain"):
        loss = parts.core_loss(core, 1.0, side)(images).loss
        (found[side],) = torch.autograd.grad(loss, [prompt.cells[0]])
        seen = core.logits(images).log_softmax(1)
        with torch.no_grad():
            plain = frozen_logits(target, images, "batch").log_softmax(1)
        p, q = (seen, plain) if side == "prompted" else (plain, seen)
        formula = (p.exp() * (p - q)).sum(1).mean()
        torch.testing.assert_close(loss, formula)
        (expected,) = torch.autograd.grad(formula, [prompt.cells[0]])
        torch.testing.assert_close(found[side], expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found["prompted"], found["plain"], rtol=0.1)


@ROOMS
def test_vanilla_trains_only_the_copy(room: str) -> None:
    target, provider, prompt, terms = setting(room)
    trained = copy.deepcopy(target.model).requires_grad_(True)
    trained.classify = nn.Linear(9, 4)
    before, cells = fingerprint(trained), fingerprint(prompt)
    term = Term("b", 1.0, terms[1].bank, provider, False,
                engine(room).vanilla_loss(trained, provider, 2.0))  # fmt: skip
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    log = engine(room).store([term], period([term], 20), optimizer, 20)
    assert log[-5:, 0].mean() < log[:5, 0].mean()
    assert fingerprint(trained) != before
    assert fingerprint(prompt) == cells
    target.check_unchanged()
    provider.check_unchanged()


def test_real_images_pass_through_the_reference_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode b: a bank that is only a tensor gives the batches that PNGs give."""
    monkeypatch.setattr(reference.storing, "WORKERS", 0)
    source, images = tiny_source("p", 4, 0, **COLOUR), pictures(5)
    drawn = draw_storing(StoringConfig(steps=3), source.info, 5, 4, seed=0, epoch=0, task="p")
    from_tensor = Term("p", 1.0, SimpleNamespace(images=images), source, False, never)
    from_files = Term("p", 1.0, filled_bank("reference", images), source, False, never)
    ours, theirs = (batches("reference", term, drawn) for term in (from_tensor, from_files))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_colours_are_permuted_by_the_draw() -> None:
    images = torch.arange(2 * 3).view(2, 3, 1, 1).float()
    orders = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert in_drawn_colours(images, orders).flatten(1).tolist() == [[2, 0, 1], [4, 5, 3]]
    assert torch.equal(in_drawn_colours(images, None), images)
