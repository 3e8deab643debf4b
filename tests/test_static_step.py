"""The body of a step can be captured: nothing looks at a number, draws one or copies from the host.

Shown on the CPU by watching every operation that the body dispatches; on a GPU by capturing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from small_periods import parts
from stand_ins import tiny_source, wave
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from kiop_fast.config import StoringConfig
from kiop_fast.errors import GraphError
from kiop_fast.kernels import dispatch
from kiop_fast.runtime import draws, optimizers
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.profile import Counter as Operations
from kiop_fast.runtime.static_step import StaticStep, hold, rehearse
from kiop_fast.source.classifier import trainable_copy
from kiop_fast.store import Storing, Term, draw_storing, vanilla_loss
from kiop_fast.synthesize import ImageBank, draw_synthesis

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

# What waits for a device, or gives another result in a replay.
FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "rand", "normal_", "bernoulli", "uniform_",
             "masked_select", "unique")  # fmt: skip


class Watch(TorchDispatchMode):
    """Names of the operations dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("period", ["synthesize", "store"])
def test_a_step_never_looks_at_a_number(period: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, synthesize, store = parts(CPU)
    # Tables on the host are checked row by row; on a device, as here, nobody looks.
    monkeypatch.setattr(dispatch, "on_host", lambda table: False)
    run = synthesize if period == "synthesize" else store
    synthesize(0)
    watch, inside = Watch(), []

    def on_step(done: int, total: Tensor) -> None:
        if done == 2:
            watch.__enter__()
        elif done == 4:  # two whole steps
            watch.__exit__(None, None, None)
            inside.append(done)

    run(1, on_step)
    assert inside
    assert watch.seen["convolution.default"] >= 4
    found = [name for name in watch.seen if any(bad in name for bad in FORBIDDEN)]
    assert not found


def test_on_the_cpu_a_static_step_is_its_body() -> None:
    count = torch.zeros(())
    step = StaticStep(lambda: count.add_(1) and None, lambda: [count], CPU)  # type: ignore[arg-type, func-returns-value]
    for _ in range(3):
        step()
    assert count == 3
    assert step.captures == 0


def test_every_rehearsal_starts_from_the_present_state() -> None:
    """Three of them go through a table of one row: none may look beyond it."""
    at, seen, contexts = torch.zeros((), dtype=torch.int64), [], []

    @contextmanager
    def last() -> Iterator[None]:
        contexts.append(len(seen))
        yield

    def body() -> None:
        seen.append(int(at))
        at.add_(1)

    with Operations() as counter:
        rehearse(body, lambda: [at], 3, last)
    assert seen == [0, 0, 0]
    assert contexts == [2]
    assert at == 0
    # What is rehearsed is not counted; giving the state back is: it names both of two numbers.
    assert counter.bytes["other"] <= 8 * (2 + 3 * 2 * 2)


def test_a_rehearsed_period_is_the_same_period() -> None:
    """Its steps are fewer than the rehearsals; what these change is given back, head and all."""
    plain, rehearsed = parts(CPU, steps=2), parts(CPU, steps=2)
    made, storing, prompt, *_ = rehearsed
    drawn = draw_synthesis(
        made.config, made._step.teacher, 8, seed=0, epoch=5, task="b", call=0, stored=0
    )
    prompt.requires_grad_(False)
    made._step.begin(drawn, storing.terms[1].loss.learner, storing.terms[1].loss.mapping)
    prompt.requires_grad_(True)
    for run in made._step._runs.values():
        rehearse(run.body, run.state, 3)
    for replay in storing._replays:
        info = replay.term.source.info
        replay.begin(draw_storing(StoringConfig(steps=2, batch=5), info, 9, 5, seed=0, epoch=5,
                                  task=replay.term.name))  # fmt: skip
    rehearse(storing._move, storing._state, 3)
    left = [
        (synthesize(0).losses, store(0), *prompt.parameters())
        for _, _, prompt, synthesize, store in (plain, rehearsed)
    ]
    for one, other in zip(*left, strict=True):
        assert torch.equal(one, other)


def test_a_rehearsal_gives_back_what_a_learning_models_batchnorm_saw() -> None:
    a, b = tiny_source("a", 7, 1), tiny_source("b", 5, 2)
    student = trainable_copy(a, 5, draws.generator(0, 0, "student", "classifier")).train()
    bank = ImageBank(3, 8, CPU)
    bank.add((wave(9, 3, 8, 8).abs() * 255).to(torch.uint8), torch.zeros(9, dtype=torch.int64))
    term = Term("b", 1.0, bank, b, False, vanilla_loss(student, b, 3.0))
    storing = Storing([term], optimizers.sgd(student.parameters(), 0.5, 0.9, 1e-4), 1)
    storing._replays[0].begin(
        draw_storing(StoringConfig(steps=1, batch=5), b.info, 9, 5, seed=0, epoch=0, task="b")
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    storing._move()
    after = {name: value.clone() for name, value in student.state_dict().items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    storing.at.zero_()
    rehearse(storing._move, storing._state, 3)
    assert all(torch.equal(value, after[name]) for name, value in student.state_dict().items())


@pytest.mark.gpu
@needs_gpu
def test_a_replayed_step_gives_what_calling_it_gives() -> None:
    left = []
    for graphs in (True, False):
        _, _, prompt, synthesize, store = parts(CUDA, execution=Execution(graphs=graphs))
        results = [(synthesize(epoch), store(epoch)) for epoch in range(3)]
        left.append([
            *(result.losses for result, _ in results), *(log for _, log in results),
            *(cells.detach().cpu() for cells in prompt.cells),
        ])  # fmt: skip
    for replayed, called in zip(*left, strict=True):
        torch.testing.assert_close(replayed, called, rtol=2e-3, atol=1e-4)


def test_a_table_of_fewer_steps_lies_where_the_longer_one_lay() -> None:
    held: dict[str, Tensor] = {}
    hold(held, CPU, crop=torch.zeros(4, 3), mapping=torch.tensor([1, 2]))
    before = {name: table.data_ptr() for name, table in held.items()}
    hold(held, CPU, crop=torch.ones(2, 3), mapping=torch.tensor([2, 1]))
    assert {name: table.data_ptr() for name, table in held.items()} == before
    assert held["crop"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert held["mapping"].tolist() == [2, 1]
    for longer in ({"crop": torch.ones(5, 3)}, {"mapping": torch.tensor([0])}):
        hold(held, CPU, **longer)
        ((name, table),) = longer.items()
        assert held[name].tolist() == table.tolist()


def test_every_region_is_compiled_once_while_the_bank_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted by torch's own counting backend, which compiles nothing and so needs no time."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    made, _, _, synthesize, store = parts(CPU, execution=Execution(compile=True))
    counted = []
    for epoch in range(9):
        synthesize(epoch)
        store(epoch)
        counted.append(counter.frame_count)
    assert made.features.stored == 54
    # Generator; head with gradients and without; those two again once the bank holds rows.
    assert counted == [3] + 8 * [5]


def test_compiled_regions_learn_as_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's tracing of forward and backward, with an empty bank and with rows in it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = (parts(CPU, execution=Execution(compile=on))[3] for on in (False, True))
    for epoch in range(2):
        torch.testing.assert_close(
            compiled(epoch).losses, eager(epoch).losses, rtol=1e-4, atol=1e-5
        )


@pytest.mark.gpu
@needs_gpu
def test_captures_grow_with_the_banks_buckets_not_with_epochs() -> None:
    made, storing, _, synthesize, store = parts(CUDA)
    for epoch in range(9):
        synthesize(epoch)
        store(epoch)
    # Rows before a call: 0, 6, 12, …, 48: windows 0, 8, 16, 32, 64, then 40 of 42 and 48 sampled.
    assert made.captures == 6
    assert storing.captures == 1


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_cannot_be_captured() -> None:
    number = torch.zeros((), device=CUDA)
    step = StaticStep(lambda: number.fill_(number.item() + 1) and None, lambda: [number], CUDA)  # type: ignore[arg-type, func-returns-value]
    with pytest.raises(GraphError, match="no-graphs"):
        step()
