"""The body of a step can be captured: nothing looks at a number, draws one or copies from the host.

Shown on the CPU by watching every operation that the body dispatches; on a GPU by capturing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import tiny_source, wave
from tolerances import ABSOLUTE, ENGINES
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from kiop_fast.config import PromptConfig, RunConfig, StoringConfig, SynthesisConfig
from kiop_fast.engine import engine
from kiop_fast.errors import ConfigError, GraphError
from kiop_fast.kernels import dispatch
from kiop_fast.prompt import Prompt, PromptedModel
from kiop_fast.runtime import draws, optimizers
from kiop_fast.runtime.execution import AS_SET, PLAIN, Execution
from kiop_fast.runtime.profile import Counter as Operations
from kiop_fast.runtime.profile import StepProfiler, stage
from kiop_fast.runtime.split_linear import split_linear
from kiop_fast.runtime.state import load_optimizer, optimizer_tensors
from kiop_fast.runtime.static_step import StaticStep, hold, rehearse
from kiop_fast.source.classifier import trainable_copy
from kiop_fast.store import Storing, Term, core_loss, draw_storing, provider_loss, vanilla_loss
from kiop_fast.synthesize import ImageBank, Synthesizer, draw_synthesis

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


def parts(device: torch.device, steps: int = 6, execution: Execution = PLAIN) -> Any:
    """Synthesizer and storing of one provider behind one prompt."""
    facts = {"mean": (0.5, 0.4, 0.45), "std": (0.25, 0.3, 0.2)}
    a, b = tiny_source("a", 7, 1, **facts), tiny_source("b", 5, 2, **facts)
    for source in (a, b):
        source.model.to(device)
    prompt = Prompt(8, (11, 20)).to(device)
    mapping = torch.tensor([3, 0, 6, 1, 5], device=device)
    core, seen = PromptedModel(a, prompt, 1), PromptedModel(a, prompt, 2, mapping)
    config = SynthesisConfig(batch=6, steps=steps, latent=12, width=5, pad=2, negatives=40)
    made = Synthesizer(
        b, config, b.info, side=8, bank_rows=64, seed=0, task="b", device=device,
        execution=execution,
    )  # fmt: skip
    banks = {name: ImageBank(3, 8, device, 60) for name in "ab"}
    for bank in banks.values():
        bank.add((wave(9, 3, 8, 8).abs() * 255).to(torch.uint8), torch.zeros(9, dtype=torch.int64))
    terms = [
        Term("a", 1.0, banks["a"], a, False, core_loss(core, 3.0, "prompted")),
        Term("b", 1.0, banks["b"], b, False, provider_loss(seen, b, 3.0, "provider")),
    ]
    optimizer = optimizers.sgd(prompt.parameters(), 0.5, 0.9, 1e-4)
    storing = Storing(terms, optimizer, steps, execution)

    def synthesize(epoch: int, on_step: Any = None) -> Any:
        drawn = draw_synthesis(
            config, b, 8, seed=0, epoch=epoch, task="b", call=0, stored=made.features.stored
        )
        prompt.requires_grad_(False)
        result = made.synthesize(drawn, seen.logits, mapping, on_step)
        prompt.requires_grad_(True)
        return result

    def store(epoch: int, on_step: Any = None) -> Tensor:
        drawn = {
            term.name: draw_storing(
                StoringConfig(steps=steps, batch=5), term.source.info, len(term.bank.images), 5,
                seed=0, epoch=epoch, task=term.name,
            )
            for term in terms
        }  # fmt: skip
        return storing.run(drawn, on_step)

    return made, storing, prompt, synthesize, store


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


def test_profile_counts_and_times_stages(tmp_path: Path) -> None:
    a, b = torch.ones(16, 32), torch.ones(32, 8)
    counter = Operations()
    with counter, stage("product"):
        _ = a @ b
    assert counter.flops == {"product": 2 * 16 * 32 * 8}
    assert counter.bytes["product"] == 4 * (16 * 32 + 32 * 8 + 16 * 8)

    _, _, _, synthesize, _ = parts(CPU, steps=9)
    profiler = StepProfiler(tmp_path / "profile", "synthesize b")
    profiler.start()
    synthesize(0, profiler)
    rows = profiler.rows()
    names = [name for name, *_ in rows]
    assert {"generator", "views", "teacher", "student", "contrastive", "backward"} < set(names)
    assert names[-1] == "step"
    assert sum(ms for name, ms, *_ in rows[:-1]) <= rows[-1][1] * 1.01
    assert (tmp_path / "profile" / "synthesize b.json").stat().st_size > 1000


def test_half_precision_stays_near_single() -> None:
    """bf16 has 8 bits: losses of the first step agree to a few parts in a hundred."""
    single = parts(CPU)[3](0).losses[0]
    half = parts(CPU, execution=Execution("bf16"))[3](0).losses[0]
    assert half.dtype == torch.float32
    assert not torch.equal(single, half)
    torch.testing.assert_close(
        half[[0, 1, 3, 4]], single[[0, 1, 3, 4]], rtol=ENGINES["bf16"], atol=ABSOLUTE["bf16"]
    )


def test_three_bf16_products_are_nearly_fp32() -> None:
    """Each factor keeps 16 bits, so a sum errs by at most 3 · 2⁻¹⁷ of its terms' magnitudes."""
    x, w, b = wave(40, 70, pace=0.7), wave(30, 70, pace=1.3), wave(30)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    cotangent = wave(40, 30, pace=0.3)
    ours = split_linear(*inputs)
    gradients = torch.autograd.grad(ours, inputs, cotangent)
    x, w, b, g = (t.double() for t in (x, w, b, cotangent))
    for found, exact, size in (
        (ours, x @ w.T + b, x.abs() @ w.abs().T),
        (gradients[0], g @ w, g.abs() @ w.abs()),
        (gradients[1], g.T @ x, g.abs().T @ x.abs()),
    ):
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= size * 3 * 2**-17 + 1e-6).all()
    torch.testing.assert_close(gradients[2], g.sum(0).float())
    rough = x.bfloat16() @ w.T.bfloat16() + b.bfloat16()
    assert (rough - x @ w.T - b).abs().max() > 30 * (ours - x @ w.T - b).abs().max()


def test_the_head_takes_three_products_when_asked() -> None:
    single = parts(CPU)[3](0).losses
    split = parts(CPU, execution=Execution("bf16x3"))[3](0).losses
    assert not torch.equal(single, split)
    torch.testing.assert_close(split[0], single[0], rtol=1e-5, atol=1e-6)


def test_precision_that_the_device_lacks() -> None:
    with pytest.raises(ConfigError, match="lacks the precision asked for") as error:
        engine("fast").execution(RunConfig(precision="tf32"), CPU)
    assert "tf32 on cpu" in str(error.value)
    assert "one of fp32, bf16" in str(error.value)
    with pytest.raises(ConfigError, match="precision"):
        RunConfig(precision="fp16")
    with pytest.raises(ConfigError, match="reference engine"):
        RunConfig(engine="reference", precision="bf16")


@pytest.mark.parametrize("outside", ["highest", "high"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3", "bf16"])
def test_products_are_tf32_where_asked_and_only_there(precision: str, outside: str) -> None:
    """Also by the old names of torch's flags, which refuse to answer where old and new differ."""

    def flags() -> tuple[str, bool, bool]:
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        return torch.get_float32_matmul_precision(), products.allow_tf32, convolutions.allow_tf32

    before = flags()
    torch.set_float32_matmul_precision(outside)
    try:
        around = flags()
        with Execution(precision).products(CUDA):
            tf32 = precision == "tf32"
            assert flags() == ("high" if tf32 else "highest", tf32, tf32)
        assert flags() == around
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_steps_search_for_algorithms_and_leave_the_flags_as_they_were() -> None:
    cudnn = torch.backends.cudnn
    assert not cudnn.benchmark
    with PLAIN.products(CUDA):
        assert not cudnn.benchmark
    with PLAIN.products(CUDA, search=True):
        assert cudnn.benchmark
    assert not cudnn.benchmark
    cudnn.deterministic = True
    try:
        with PLAIN.products(CUDA, search=True):
            assert not cudnn.benchmark
    finally:
        cudnn.deterministic = False


@pytest.mark.parametrize("allowed", [True, False])
def test_flags_as_set_stay_as_set(allowed: bool) -> None:
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = allowed
    try:
        with Execution(AS_SET).products(CUDA, search=True):
            assert cudnn.allow_tf32 == allowed
    finally:
        cudnn.allow_tf32 = before


def test_dropout_that_stays_on_rules_graphs_out() -> None:
    assert engine("fast").execution(RunConfig(), CPU)["execution"].graphs
    upstream = RunConfig(prompt=PromptConfig(dropout=True))
    assert not engine("fast").execution(upstream, CPU)["execution"].graphs
    assert engine("reference").execution(RunConfig(engine="reference"), CPU) == {}


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
    # Generator; head with gradients for inputs and weights, with none, with the weights' alone,
    # which cached rows ask for: there are none before the second epoch.
    assert counted == [3] + 8 * [4]


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
