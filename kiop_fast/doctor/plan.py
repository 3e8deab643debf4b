"""Whether a run would work: its models, classes, rings, data, memory and time."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kiop_fast.config import RunConfig
from kiop_fast.data import BUILT_IN, dataset
from kiop_fast.deliver.evaluate import has_test_data, read_test
from kiop_fast.doctor.check import Check, duration, failed, look, size
from kiop_fast.doctor.machine import free_memory
from kiop_fast.pipeline import load_inner
from kiop_fast.pretrain import cached_source_path
from kiop_fast.prompt import check_class_counts
from kiop_fast.run import Run
from kiop_fast.runtime.device import threads
from kiop_fast.runtime.profile import OnStep
from kiop_fast.source import (
    Source,
    SourceSpec,
    batchnorm_layers,
    freeze,
    load_source,
    parse_source,
)
from kiop_fast.source.schemes import build_untrained
from kiop_fast.sources import Sources

_STEPS = 2  # of each period that are run to see that they run, and to time them
_GPU_STEPS = 12  # the first of them is no measure there
_ADAM = 4  # copies of the head: weights, gradients, two moments
_BYTES = 4  # fp32


def plan_checks(config: RunConfig, device: torch.device) -> list[Check]:
    """Every check of a run; those that need its models are left out where a model is missing."""
    found: dict[str, Source] = {}
    names = {"target": config.target}
    names |= {f"provider {i + 1}": name for i, name in enumerate(config.providers)}
    checks = [Check("settings", "pass", f"preset {config.preset}, mode {config.mode}, side "
                    f"{config.side}, rings {list(config.prompt.rings)}")]  # fmt: skip
    if not config.target:
        return [*checks, Check("target", "FAIL", "no model A is named", "--target NAME@DATA=PATH")]
    for role, name in names.items():
        checks += _source(role, name, config, device, found)
    if failed(checks):
        return checks
    sources = Sources(found["target"], tuple(found[role] for role in names if role != "target"))
    checks.append(look("mapping", lambda: _mapping(config, sources)))
    checks.append(look("memory of the run", lambda: _memory(config, sources, device)))
    if not failed(checks):
        checks.append(look("time of the run", lambda: _time(config, sources, device)))
    return checks


def _source(
    role: str, name: str, config: RunConfig, device: torch.device, found: dict[str, Source]
) -> list[Check]:
    """The model itself, its BatchNorm layers and its data."""
    inner = load_inner(config)
    rings = (*(inner.rings if inner else ()), *config.prompt.rings) if role == "target" else ()
    sides = (config.side, *rings)

    def model() -> Check:
        spec = parse_source(name)
        source, note = _load(spec, sides, device)
        found[role] = source
        info = source.info
        normaliser = "[0, 1] as it is" if set(info.std) == {1.0} else f"{info.mean} / {info.std}"
        said = (
            f"{name}: {source.classes} classes, "
            f"{_parameters(source.model) / 1e6:.1f} M parameters, normaliser {normaliser}{note}"
        )
        if info.side != config.side and info.name not in BUILT_IN:
            return Check(role, "note", f"{said}; its data is {info.side} pixels wide, the run "
                         f"{config.side}")  # fmt: skip
        return Check(role, "pass", said)

    checks = [look(role, model)]
    if role in found:
        checks.append(look(f"{role}: BatchNorm", lambda: _batchnorm(role, found[role])))
        checks.append(look(f"{role}: data", lambda: _data(role, found[role], config)))
    return checks


def _load(spec: SourceSpec, sides: tuple[int, ...], device: torch.device) -> tuple[Source, str]:
    """A source, or its untrained likeness where the run would train it first."""
    if spec.data:
        dataset(spec.data)  # an unknown name is the first thing to say
    cached = cached_source_path(spec, sides[0])
    if spec.path is not None or cached is None or cached.exists():
        return load_source(spec, sides=sides, device=device), ""
    info = dataset(spec.data).info
    model = build_untrained(spec.name, len(info.classes), sides[0], seed=0).to(device)
    return freeze(model, info, name=spec.label, arch=spec.arch), "; is trained first"


def _batchnorm(role: str, source: Source) -> Check:
    layers = batchnorm_layers(source.model)
    width = sum(layer.num_features for layer in layers.values())
    said = f"{len(layers)} layers, features {width:,} wide"
    return Check(f"{role}: BatchNorm", "pass", said)


def _data(role: str, source: Source, config: RunConfig) -> Check:
    name = f"{role}: data"
    if config.mode == "b" and role == "target":
        count = len(dataset(source.info.name).train(config.side).labels)
        return Check(name, "pass", f"{source.info.name}: {count:,} training images")
    if not config.evaluation.every:
        return Check(name, "note", "not read: evaluation.every=0")
    if not has_test_data(source.info):
        return Check(
            name, "note", f"{source.info.name} has no test data; its task is not evaluated"
        )
    count = len(read_test(source.info, config.side).labels)
    return Check(name, "pass", f"{source.info.name}: {count:,} test images")


def _mapping(config: RunConfig, sources: Sources) -> Check:
    target = sources.target
    for provider in sources.providers if config.mode != "vanilla" else ():
        check_class_counts(target.classes, provider.classes, (target.name, provider.name))
    needed = " + ".join(str(provider.classes) for provider in sources.providers) or "none"
    return Check("mapping", "pass", f"{config.prompt.mapping}; {target.classes} classes of A for "
                 f"{needed}")  # fmt: skip


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fixed_bytes(config: RunConfig, sources: Sources, *, offload: bool = False) -> dict[str, float]:
    """Bytes that a run holds on its device apart from activations: models, heads, banks.

    Args:
        offload: heads and feature banks have one place in turns.
    """
    period = config.synthesis
    held = {"models": 0.0, "projection heads": 0.0, "feature banks": 0.0, "image banks": 0.0}
    lasting = [(0.0, 0.0)]  # of every task: head with its Adam, feature bank
    for source in (sources.target, *sources.providers):
        narrow = 2 if config.precision == "bf16" else 0  # casts that are kept
        held["models"] += (_BYTES + narrow) * _parameters(source.model)
        own = source is sources.target
        if own and config.mode in ("b", "t", "vanilla"):
            continue
        epochs = period.epochs_for(own_task=own, epochs=config.epochs)
        images = epochs * config.rounds * period.calls * period.batch
        width = sum(layer.num_features for layer in batchnorm_layers(source.model).values())
        hidden = period.head_width or width
        head = (width + 1) * hidden + (hidden + 1) * period.head_dim
        row = 2 * width * (2 if config.precision == "bf16" else _BYTES)
        lasting.append((
            _ADAM * _BYTES * head if period.cr else 0.0, row * min(period.bank_rows, images)
        ))  # fmt: skip
        held["image banks"] += images * source.info.channels * config.side**2
    kept = [max(lasting, key=sum)] if offload else lasting
    held["projection heads"], held["feature banks"] = map(sum, zip(*kept, strict=True))
    return held


def saved_bytes(call: Callable[[], object]) -> float:
    """Bytes that autograd keeps from the forward pass to the backward pass of ``call``."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return float(sum(kept.values()))


def _activations(config: RunConfig, sources: Sources, device: torch.device) -> float:
    """Of the widest pass, A through all rings, for one batch."""
    canvas = config.side if config.mode == "vanilla" else config.prompt.rings[-1]
    target = sources.target

    def seen(count: int) -> float:
        images = torch.zeros(count, 3, canvas, canvas, device=device, requires_grad=True)
        return saved_bytes(lambda: target.model(images))

    batch = max(config.synthesis.batch, config.storing.batch)
    one = seen(1)  # with what does not grow, e.g. weights
    return one + (seen(2) - one) * (batch - 1)


def _memory(config: RunConfig, sources: Sources, device: torch.device) -> Check:
    offloads = device.type == "cuda" and config.engine == "fast"
    parts = fixed_bytes(config, sources, offload=config.offload and offloads)
    parts["activations"] = _activations(config, sources, device)
    needed, free = sum(parts.values()), free_memory(device)
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    said = f"about {size(needed)} of {size(free)} free on {device}: {listed}"
    if needed <= 0.9 * free:
        return Check("memory of the run", "pass", said)
    largest = max(parts, key=lambda name: parts[name])
    several = len(sources.providers) + (config.mode == "bf") > 1
    offload = ", or offload=true" if offloads and several and not config.offload else ""
    ways = {
        "projection heads": "synthesis.head_width=256" + offload,
        "feature banks": "synthesis.bank_rows=4096" + offload,
        "activations": "a smaller synthesis.batch and storing.batch, or smaller prompt.rings",
        "image banks": "a smaller synthesis.batch or fewer epochs",
        "models": "smaller models",
    }
    second = sorted(parts, key=lambda name: -parts[name])[1]
    fix = f"{ways[largest]}; next largest: {ways[second]}"
    return Check("memory of the run", "FAIL", said, fix)


class _Stopwatch:
    """Stands where a run's profiler would: when the steps of a period ended.

    Attributes:
        ends: perf_counter of every finished step, by period.
    """

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {}

    def watch(self, name: str, then: OnStep | None) -> OnStep:
        ends = self.ends.setdefault(name, [])

        def on_step(done: int, total: torch.Tensor) -> None:
            if total.is_cuda:
                torch.cuda.synchronize(total.device)
            ends.append(time.perf_counter())
            if then is not None:
                then(done, total)

        return on_step


def seconds_a_step(run: Run, period: Callable[[], object], steps: int) -> float:
    """Of one step of each of a period's tasks, together.

    On a GPU without the first step, which compiles, searches and captures; on a CPU of the period
    as a whole.
    """
    stopwatch = _Stopwatch()
    run.profiles = stopwatch  # type: ignore[assignment]
    began = time.perf_counter()
    period()
    whole = time.perf_counter() - began
    run.profiles = None
    if run.device.type != "cuda":
        return whole / steps
    return sum((ends[-1] - ends[0]) / (len(ends) - 1) for ends in stopwatch.ends.values())


def _time(config: RunConfig, sources: Sources, device: torch.device) -> Check:
    """A few steps of both periods, run as the run would, and the rest by counting."""
    steps = _STEPS if device.type == "cpu" else _GPU_STEPS
    short = dataclasses.replace(
        config,
        synthesis=dataclasses.replace(config.synthesis, steps=steps, meta_steps=0, calls=1),
        storing=dataclasses.replace(config.storing, steps=steps),
    )
    with tempfile.TemporaryDirectory() as scratch, threads(config.threads):
        run = Run(short, sources, device, Path(scratch), load_inner(config))
        seconds = {
            "synthesis": seconds_a_step(run, lambda: run.synthesize(0, None), steps),
            "storing": seconds_a_step(run, lambda: run.store(0, None), steps),
        }
    period = config.synthesis
    making = [task for task in run.tasks if task.synthesizer is not None]
    calls = config.rounds * period.calls * sum(task.epochs for task in making)
    fewer = len(making) * (period.steps - period.steps_of(1, 0))  # a first call has them all
    synthesis_steps = calls * period.steps_of(1, 0) + fewer
    step = seconds["synthesis"] / max(1, len(making))
    turns = config.epochs * config.rounds
    total = synthesis_steps * step + turns * config.storing.steps * seconds["storing"]
    return Check("time of the run", "pass", f"about {duration(total)}: {calls:,} synthesize calls, "
                 f"{synthesis_steps:,} steps at {1e3 * step:.1f} ms, "
                 f"{turns} × {config.storing.steps} prompt steps at "
                 f"{1e3 * seconds['storing']:.1f} ms (measured over {steps} steps with empty "
                 "feature banks; without evaluation)")  # fmt: skip
