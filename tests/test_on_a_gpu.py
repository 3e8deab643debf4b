"""What runs on a GPU alone, on an emulated one where there is none.

The tests marked ``gpu`` run in a process of their own there; see :mod:`emulated_cuda`.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_periods import parts
from stand_ins import tiny_source

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override
from kiop_fast.pipeline import train
from kiop_fast.run import Run
from kiop_fast.runtime.execution import Execution
from kiop_fast.runtime.static_step import Scratch
from kiop_fast.sources import Sources

HERE = Path(__file__).parent
CUDA = torch.device("cuda")
ON_GPU = torch.cuda.is_available()
EMULATED = ON_GPU and torch.cuda.get_device_name() == "emulated"

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
needs_emulation = pytest.mark.skipif(
    not EMULATED, reason="test_gpu_tests_on_an_emulated_gpu runs this in its own process"
)

# The kernels in Triton's interpreter; whole periods with their eager twins, which are quick.  Half
# precisions and prompt_pad's canvas of the paper are left to a GPU, for the interpreter's sake.
SELECTIONS = {
    "triton": ["tests/kernels", "-k", "graph_replay and not (test_prompt_pad or float16)"],
    "torch": ["tests/test_static_step.py", "tests/test_library.py", "tests/test_on_a_gpu.py"],
}
NEEDS_THE_DRIVER = {"test_pixels.py", "test_epochs.py"}  # of tests/loading: DALI asks for it


def test_every_gpu_test_is_selected_or_left_out_on_purpose() -> None:
    mark = "@pytest.mark." + "gpu"
    marked = {path for path in HERE.rglob("test_*.py") if mark in path.read_text()}
    selected = {path for path in marked if path.parent.name == "kernels"}
    selected |= {HERE.parent / name for name in SELECTIONS["torch"]}
    assert {path.name for path in marked - selected} == NEEDS_THE_DRIVER


@pytest.mark.skipif(ON_GPU, reason="the tests themselves run here")
@pytest.mark.parametrize("kernels", SELECTIONS)
def test_gpu_tests_on_an_emulated_gpu(kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    where = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    how = {"KIOP_FAST_KERNELS": kernels, "TRITON_INTERPRET": str(int(kernels == "triton"))}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "emulated_cuda", "-p", "no:cacheprovider",
         "-m", "gpu", "--durations=5", *SELECTIONS[kernels]],
        cwd=HERE.parent, env=os.environ | where | how, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout + run.stderr
    assert not re.search(r"\d+ skipped", run.stdout), run.stdout
    assert re.search(r"\d+ passed", run.stdout), run.stdout


TINY: dict[str, Any] = {
    "side": 8,
    "epochs": 2,
    "threads": 1,
    "prompt": {"rings": [11, 12], "mapping": "random", "calibration_batch": 4},
    "synthesis": {"batch": 4, "steps": 3, "latent": 8, "width": 4, "head_width": 8,
                  "head_dim": 16, "pad": 1, "negatives": 10},
    "storing": {"steps": 3, "batch": 4, "pad": 1, "flip": 0.5, "augment_as_dataset": False},
    "evaluation": {"every": 0},
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "two calls, sampled negatives": {"synthesis": {"calls": 2}},
    "two providers": {"prompt": {"rings": [11, 12, 14]}},
    "offloaded, two providers, sampled negatives": {
        "offload": True,
        "prompt": {"rings": [11, 12, 14]},
        "synthesis": {"calls": 2},
    },
    "one ring": {"mode": "t", "prompt": {"rings": [12]}},
    "vanilla": {"mode": "vanilla"},
    "running": {"prompt": {"batchnorm": "running"}},
    "meta start, mappings within a period": {
        "synthesis": {"start": "meta", "meta_steps": 2},
        "prompt": {"mapping": "likelihood", "mapping_steps": 1},
    },
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_what_it_learns_on_the_cpu(name: str, double: None, tmp_path: Path) -> None:
    """Captured and replayed, over several calls and epochs; in fp64, which leaves only rounding."""
    found, changed = {}, {}
    for device in ("cpu", "cuda"):
        providers = [tiny_source("one", 4, 2), tiny_source("two", 5, 3)]
        sources = Sources(
            tiny_source("target", 7, 1), tuple(providers[: 1 + ("two providers" in name)])
        )
        for source in (sources.target, *sources.providers):
            source.model.to(device)
        config = override(override(RunConfig(device=device), TINY), RUNS[name])
        result = train(config, tmp_path / device, sources=sources)
        found[device] = [metrics["loss"] for metrics in result.metrics]
        changed[device] = [metrics["mapping_changed"] for metrics in result.metrics]
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert there == pytest.approx(here, rel=1e-9, abs=1e-12)
    assert changed["cuda"] == changed["cpu"]
    if name.endswith("mappings within a period"):
        assert all(epoch["one"] > 0 for epoch in changed["cuda"]), "graphs read what has moved"


@pytest.mark.gpu
@needs_gpu
def test_an_offloaded_run_goes_on_where_it_stopped(double: None, tmp_path: Path) -> None:
    """Its checkpoint has every task's head, moments and features, whoever has the place."""
    sources = Sources(tiny_source("target", 7, 1), (tiny_source("one", 4, 2),))
    for source in (sources.target, *sources.providers):
        source.model.to(CUDA)
    config = override(override(RunConfig(device="cuda"), TINY), {"epochs": 3, "offload": True})
    whole = train(config, tmp_path / "whole", sources=sources)

    def stop(stage: str, done: int, total: int, **values: float) -> None:
        if stage.startswith("epoch 3/3") and "store" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halved", sources=sources, progress=stop)
    halved = train(config, tmp_path / "halved", sources=sources, resume=True)
    for one, other in zip(whole.metrics, halved.metrics, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-9, abs=1e-12)


@pytest.mark.gpu
@needs_emulation
def test_offloaded_tasks_take_the_memory_of_the_largest(tmp_path: Path) -> None:
    from emulated_cuda import CARD

    sources = Sources(tiny_source("target", 7, 1), (tiny_source("one", 4, 2),))
    for source in (sources.target, *sources.providers):
        source.model.to(CUDA)
    most = {}
    for offload in (False, True):
        gc.collect()
        before = CARD.memory.peak[None] = CARD.memory.now[None]
        config = override(RunConfig(device="cuda", offload=offload), TINY)
        run = Run(override(config, {"synthesis": {"head_width": 5000}}), sources, CUDA, tmp_path)
        for task in run.tasks:
            task.enter()
        most[offload] = CARD.memory.peak[None] - before
        sizes = [sum(t.nbytes for t in task.synthesizer.lasting) for task in run.tasks]
        del run, task
    assert most[False] - most[True] == pytest.approx(min(sizes), rel=0.05)


@pytest.mark.gpu
@needs_emulation
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_captured_step_leaves_nothing_behind(shared: bool, precision: str) -> None:
    """So the graphs of a run lie on top of each other, in one pool; nor is a weight cast in it."""
    from emulated_cuda import CARD

    before = dict(CARD.memory.peak)
    execution = Execution(precision, scratch=Scratch(CUDA) if shared else None)
    made, storing, _, synthesize, store = parts(CUDA, execution=execution)
    for epoch in range(3):
        synthesize(epoch)
        store(epoch)
    pools = [pool for pool in CARD.memory.peak if pool not in {None, *before}]
    assert len(pools) == (1 if shared else 2)
    assert all(CARD.memory.peak[pool] > 0 for pool in pools)
    assert all(CARD.memory.now[pool] == 0 for pool in pools)
    (graph,) = (run._graph for run in storing._runs.values())
    cast = [args[0] for func, args, *_ in graph.calls if func is torch.ops.aten._to_copy.default]
    weights = {p.shape for p in made._step.teacher.model.parameters() if p.dim() > 1}
    assert not [value for value in cast if getattr(value, "place", [0, None])[1] in weights]


@pytest.mark.gpu
@needs_emulation
def test_the_host_waits_once_from_the_first_step_of_a_period_on() -> None:
    from emulated_cuda import CARD

    _, _, _, synthesize, store = parts(CUDA)
    for period in (synthesize, store):
        for epoch in range(3):
            waits: list[int] = []
            period(epoch, lambda done, loss, waits=waits: waits.append(CARD.waits))
            assert waits[-1] == waits[0]
            assert CARD.waits == waits[0] + 1


@pytest.mark.gpu
@needs_gpu
def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    assert (torch.ones(3, device=CUDA) * torch.tensor(2.0)).tolist() == [2.0] * 3
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device=CUDA).numpy()


@pytest.mark.gpu
@needs_gpu
def test_a_capture_does_nothing_and_a_replay_does_everything() -> None:
    counted, step = torch.zeros(2, device=CUDA), torch.ones((), device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counted.add_(step)
        doubled = counted * 2 + torch.arange(2, device=CUDA)
    assert counted.tolist() == [0.0, 0.0]
    graph.replay()
    step.fill_(3.0)
    graph.replay()
    assert counted.tolist() == [4.0, 4.0]
    assert doubled.tolist() == [8.0, 9.0]


@pytest.mark.gpu
@needs_emulation
@pytest.mark.parametrize("wait", ["item", "cpu", "upload", "tensor", "mask", "host index"])
def test_waiting_in_a_capture_is_refused(wait: str) -> None:
    """On a GPU this would leave the process without one."""
    number, host = torch.zeros(2, device=CUDA), torch.zeros(2)
    waits = {
        "item": lambda: number.sum().item(),
        "cpu": lambda: number.cpu(),
        "upload": lambda: number.copy_(host),
        "tensor": lambda: torch.tensor([1.0], device=CUDA),
        "mask": lambda: number[number > 1],
        "host index": lambda: number[torch.tensor([0])],
    }
    with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(
        torch.cuda.CUDAGraph()
    ):  # fmt: skip
        waits[wait]()


@pytest.mark.gpu
@needs_emulation
def test_a_replay_over_memory_given_back_is_found() -> None:
    result, given_back = torch.zeros(2, device=CUDA), torch.ones(2, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.add_(given_back)
    graph.replay()
    del given_back
    with pytest.raises(RuntimeError, match="given back"):
        graph.replay()
