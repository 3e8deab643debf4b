"""Both engines follow the same draws to the same numbers: every loss, image, weight and cell."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import tiny_source
from tolerances import ENGINES
from torch import Tensor

from kiop_fast.config import StoringConfig, SynthesisConfig
from kiop_fast.engine import Engine, engine
from kiop_fast.prompt import Prompt, random_mapping
from kiop_fast.runtime import draws
from kiop_fast.source import DropoutDraws
from kiop_fast.store import Term, draw_storing
from kiop_fast.synthesize import MetaStart, draw_synthesis, generator_channels

CPU = torch.device("cpu")
SIDE, BATCH, SEED = 8, 6, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One small run; the defaults are the plain one."""

    providers: int = 1
    epochs: int = 3
    rings: tuple[int, ...] = (11, 16)  # both differences odd or even
    mode: str = "bf"  # bf | t | vanilla
    batchnorm: str = "batch"
    bank_rows: int = 100
    channels: int = 3  # of every provider
    dropout: float = 0.0  # of the target, left on
    synthesis: dict[str, Any] = dataclasses.field(default_factory=dict)
    storing: dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "plain": Case(),
    "running statistics": Case(batchnorm="running"),
    "calibrated trains as batch": Case(batchnorm="calibrated", epochs=2),
    "bank exactly full": Case(bank_rows=2 * BATCH),
    "bank wrapped, batch not dividing it": Case(bank_rows=2 * BATCH + 1, epochs=4),
    "bank smaller than a batch": Case(bank_rows=BATCH - 1),
    "negatives sampled": Case(synthesis={"negatives": 4}),
    "no adversarial term": Case(synthesis={"adv": 0.0}),
    "no contrastive term": Case(synthesis={"cr": 0.0}, epochs=2),
    "strong terms": Case(synthesis={"adv": 3.0, "bn": 5.0, "oh": 0.3, "cr_temperature": 0.1}),
    "narrow head": Case(synthesis={"head_width": 7, "head_dim": 3}),
    "views of another geometry": Case(
        synthesis={"pad": 1, "scale": (0.1, 0.3), "ratio": (0.3, 3.0), "flip": 1.0}
    ),
    "start from earlier calls": Case(
        synthesis={"start": "meta", "meta_steps": 3, "meta_rate": 0.7}
    ),
    "grey generator": Case(channels=1),
    "grey by averaging": Case(channels=1, synthesis={"grey": False}),
    "bank augmented": Case(
        storing={"augment_as_dataset": False, "pad": 2, "flip": 0.5, "weight_decay": 0.01}
    ),
    "augmented as its dataset": Case(facts={"pad": 1, "flip": 0.5}),
    "three providers": Case(providers=3, rings=(11, 16, 17, 19), epochs=2),
    "other side is the target": Case(
        storing={"target_of_a": "plain", "target_of_b": "prompted", "temperature": 2.0}
    ),
    "one ring, provider's term only": Case(mode="t", rings=(13,)),
    "colours permuted": Case(storing={"shuffle_colours": True}, epochs=2),
    "dropout left on": Case(dropout=0.4, epochs=2),
    "vanilla": Case(mode="vanilla", epochs=2, storing={"lr": 0.05}),
}


def play(case: Case, parts: Engine, folder: Path) -> dict[str, list[Tensor]]:
    """A run of ``case`` on one engine: everything it leaves, by name."""
    grey = {"mean": (0.2, 0.2, 0.2), "std": (0.3, 0.3, 0.3)}
    colour = {"mean": (0.5, 0.4, 0.45), "std": (0.25, 0.3, 0.2)}
    facts = {"channels": case.channels, **(grey if case.channels == 1 else colour), **case.facts}
    target = tiny_source("target", 7, 1, case.dropout, **colour)
    providers = [tiny_source(f"p{k}", 4 + k, 2 + k, **facts) for k in range(case.providers)]
    given = [source.sha256 for source in (target, *providers)]
    synthesis = SynthesisConfig(
        **{"batch": BATCH, "steps": 4, "latent": 12, "width": 5, "pad": 2, **case.synthesis}
    )
    storing = StoringConfig(**{"steps": 5, "batch": 7, "lr": 2.0, **case.storing})

    prompt = Prompt(SIDE, case.rings)
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(torch.sin(torch.arange(cells.numel()) * (0.7 + k)).view_as(cells))
    start = tiny_source("a copy of the target", providers[0].classes, 9)
    trained = copy.deepcopy(start.model).requires_grad_(True)

    def prompted(depth: int, task: str, mapping: Tensor | None = None) -> Any:
        dropout = DropoutDraws(SEED, 0, task) if case.dropout else None
        return parts.prompted(
            target, prompt, depth, mapping, batchnorm=case.batchnorm, dropout=dropout
        )

    core = prompted(1, "target")
    tasks: list[tuple[Any, Any, Any]] = []  # teacher, student's logits, mapping
    if case.mode == "bf":
        tasks.append((target, core.logits, None))
    seen = []
    for k, provider in enumerate(providers):
        mapping = random_mapping(
            draws.generator(SEED, 0, provider.name, "mapping"), 7, provider.classes
        )
        depth = 1 if case.mode == "t" else k + 2
        seen.append(prompted(min(depth, len(case.rings)), provider.name, mapping))
        if case.mode == "vanilla":
            tasks.append((provider, trained, None))
        else:
            tasks.append((provider, seen[-1].logits, mapping))

    temperature = storing.temperature
    losses = {}
    for k, provider in enumerate(providers):
        losses[provider.name] = parts.provider_loss(
            seen[k], provider, temperature, storing.target_of_b
        )
    if case.mode == "bf":
        losses["target"] = parts.core_loss(core, temperature, storing.target_of_a)
    if case.mode == "vanilla":
        losses = {"p0": parts.vanilla_loss(trained, providers[0], temperature)}
    parameters = trained.parameters() if case.mode == "vanilla" else prompt.parameters()
    optimizer = torch.optim.SGD(
        list(parameters), storing.lr, storing.momentum, weight_decay=storing.weight_decay
    )

    left: dict[str, list[Tensor]] = {}

    def leave(name: str, *values: Tensor) -> None:
        left.setdefault(name, []).extend(value.detach().clone() for value in values)

    made, banks, starts = {}, {}, {}
    for teacher, _, _ in tasks:
        made[teacher.name] = parts.synthesizer(
            teacher, synthesis, teacher.info, side=SIDE, bank_rows=case.bank_rows,
            seed=SEED, task=teacher.name, device=CPU,
        )  # fmt: skip
        if synthesis.start == "meta":
            starts[teacher.name] = MetaStart(synthesis.meta_rate)
        channels = generator_channels(synthesis, teacher)
        more = {"workers": 0} if parts.name == "reference" else {}
        banks[teacher.name] = parts.image_bank(channels, SIDE, CPU, folder / teacher.name, **more)
    for epoch in range(case.epochs):
        for teacher, student, mapping in tasks:
            system, bank = made[teacher.name], banks[teacher.name]
            drawn = draw_synthesis(
                synthesis, teacher, SIDE, seed=SEED, epoch=epoch, task=teacher.name, call=0,
                stored=system.features.stored,
            )  # fmt: skip
            if teacher.name in starts:
                drawn = starts[teacher.name].begin(drawn)
            result = system.synthesize(drawn, student, mapping)
            if teacher.name in starts:
                starts[teacher.name].end(drawn, system.generator)
                leave("start", *starts[teacher.name].weights.values())
            bank.add(result.images, result.targets)
            leave("synthesis losses", result.losses)
            leave("chosen step", torch.tensor(result.best_step))
            leave("images", result.images)
            leave("features", result.features, system.features.rows)
            leave("head", *system.head.parameters())
            assert system.features.added == (epoch + 1) * BATCH
        terms, drawn_batches = [], {}
        for teacher, _, _ in tasks:
            name = teacher.name
            averaged = teacher.info.channels == 1 and not synthesis.grey
            terms.append(Term(name, 1.5, banks[name], teacher, averaged, losses[name]))
            drawn_batches[name] = draw_storing(
                storing, teacher.info, len(banks[name]), storing.batch,
                seed=SEED, epoch=epoch, task=name,
            )  # fmt: skip
        log = parts.store(terms, drawn_batches, optimizer, storing.steps)
        leave("storing losses", log[:, : len(terms)])
        leave("agreement", log[:, len(terms) :])
        leave("cells", *prompt.cells)
        leave("trained copy", *trained.parameters())
    for teacher, _, _ in tasks:
        leave("bank", banks[teacher.name].images, banks[teacher.name].targets)
    for source, before in zip((target, *providers), given, strict=True):
        assert source.sha256 == before
        source.check_unchanged()
        assert all(p.grad is None and not p.requires_grad for p in source.model.parameters())
    return left


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    return difference / max(theirs.abs().max().item(), 1e-30)


def compare(fast: dict[str, list[Tensor]], reference: dict[str, list[Tensor]], tol: float) -> None:
    assert fast.keys() == reference.keys()
    for name in fast:
        for k, (ours, theirs) in enumerate(zip(fast[name], reference[name], strict=True)):
            assert not theirs.is_floating_point() or theirs.isfinite().all()
            if ours.dtype in (torch.uint8, torch.int64):
                assert torch.equal(ours, theirs), f"{name} {k}"
            elif name.endswith("losses"):  # every term of every step on its own scale
                for column in range(ours.shape[1]):
                    ours_, theirs_ = ours[:, column], theirs[:, column]
                    torch.testing.assert_close(ours_, theirs_, rtol=tol, atol=tol * 1e-3)
            else:
                assert gap(ours, theirs) < tol, f"{name} {k}: {gap(ours, theirs):.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agree_in_double_precision(case: Case, double: None, tmp_path: Path) -> None:
    fast = play(case, engine("fast"), tmp_path)
    reference = play(case, engine("reference"), tmp_path)
    compare(fast, reference, ENGINES["fp64"])
    moved = "trained copy" if case.mode == "vanilla" else "cells"
    first, last = fast[moved][0], fast[moved][-len(fast[moved]) // case.epochs]
    assert case.epochs == 1 or not torch.equal(first, last)


def test_agree_in_single_precision(tmp_path: Path) -> None:
    """One epoch; later ones amplify rounding (Adam divides by the gradient's size)."""
    case = Case(epochs=1)
    fast = play(case, engine("fast"), tmp_path)
    reference = play(case, engine("reference"), tmp_path)
    for name in ("images", "bank"):  # truncation may fall on either side
        for ours, theirs in zip(fast.pop(name), reference.pop(name), strict=True):
            assert (ours.int() - theirs.int()).abs().max() <= 1
    compare(fast, reference, ENGINES["fp32"])


def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    """The PNGs read by two workers give the batches that one process gives."""
    from kiop_fast.reference import ImageBank
    from kiop_fast.reference.storing import _batches

    source = tiny_source("p", 4, 2, mean=(0.5, 0.4, 0.3), pad=1, flip=0.5)
    images = (torch.arange(9 * 3 * 64) * 37 % 256).view(9, 3, 8, 8).to(torch.uint8)
    drawn = draw_storing(StoringConfig(steps=4), source.info, 9, 5, seed=0, epoch=0, task="p")
    read = []
    for workers in (0, 2):
        bank = ImageBank(3, 8, CPU, tmp_path / str(workers), workers)
        bank.add(images, torch.zeros(9, dtype=torch.int64))
        term = Term("p", 1.0, bank, source, False, lambda batch: None)  # type: ignore[arg-type, return-value]
        read.append(torch.stack(list(_batches(term, drawn))))
    assert read[0].shape == (4, 5, 3, 8, 8)
    assert torch.equal(*read)
