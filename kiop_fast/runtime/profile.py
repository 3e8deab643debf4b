"""Where the time of a step goes: named stages, their operations counted, their time taken."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

STEP = "step"  # the stage around all others
_SETTLED = 3  # steps: one is counted, two settle
_TIMED = 5  # after them
_TRACED = 2  # last: a trace costs time of its own
_stages = ["other"]
_clock: dict[str, float] | None = None  # seconds by stage, while somebody wants them


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark the operations inside as one stage of a step."""
    _stages.append(name)
    began = time.perf_counter()
    try:
        with torch.profiler.record_function(f"stage/{name}"):
            yield
    finally:
        _stages.pop()
        if _clock is not None:
            _clock[name] = _clock.get(name, 0.0) + time.perf_counter() - began


class Counter(TorchDispatchMode):
    """Counts, per stage, floating-point operations of products and bytes every operation names.

    Bytes are those of all arguments and results, views excepted: what moves if nothing stays in
    a cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops[_stages[-1]] += count(*args, **kwargs, out_val=result)
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.bytes[_stages[-1]] += sum(t.numel() * t.element_size() for t in tensors)
        return result


Row = tuple[str, float, float, float]
OnStep = Callable[[int, Tensor], None]


class StepProfiler:
    """Watches the first steps of a period: pass it as ``on_step``, then ask for the table.

    The first step is counted, five later ones are timed, two more are traced to
    ``folder/<name>.json`` (open it in chrome://tracing or Perfetto).  On a GPU stages are timed by
    the trace; a step that replays a CUDA graph shows its kernels there, not its stages.

    Args:
        folder: made if missing.
        name: of the period.
        then: the ``on_step`` that is called as well.
    """

    def __init__(self, folder: Path, name: str, then: OnStep | None = None) -> None:
        self.path, self.name, self.then = folder / f"{name}.json", name, then
        folder.mkdir(parents=True, exist_ok=True)
        self.counter = Counter()
        self.seconds = 0.0
        self.stages: dict[str, float] = {}  # ms a step
        self._trace: Any = None
        self._began = 0.0
        self._entered = False

    def start(self) -> StepProfiler:
        """Count from now on, which is before the first step; itself."""
        self.counter.__enter__()
        self._entered = True
        return self

    def __call__(self, done: int, total: Tensor) -> None:
        if self._entered:
            self.counter.__exit__(None, None, None)
            self._entered = False
        if total.is_cuda and done in (_SETTLED, _SETTLED + _TIMED, _SETTLED + _TIMED + _TRACED):
            torch.cuda.synchronize()
        if done == _SETTLED:
            self._time()
        elif done == _SETTLED + _TIMED:
            self._timed(total.is_cuda)
            self._trace = _trace(total.is_cuda)
            self._trace.__enter__()
        elif done == _SETTLED + _TIMED + _TRACED and self._trace is not None:
            self._traced(total.is_cuda)
        if self.then is not None:
            self.then(done, total)

    def _time(self) -> None:
        global _clock
        _clock, self._began = {}, time.perf_counter()

    def _timed(self, on_gpu: bool) -> None:
        """The whole step; on a CPU, where stages end when their calls do, also each of these."""
        global _clock
        found, _clock = _clock or {}, None
        between = time.perf_counter() - self._began
        whole = found.pop(STEP, between)  # without what is done between steps
        self.seconds = (between if on_gpu else whole) / _TIMED
        if not on_gpu:
            self.stages = {name: 1e3 * spent / _TIMED for name, spent in found.items()}

    def _traced(self, on_gpu: bool) -> None:
        self._trace.__exit__(None, None, None)
        self._trace.export_chrome_trace(str(self.path))
        for event in self._trace.key_averages() if on_gpu else ():
            name = event.key.removeprefix("stage/")
            if name not in (event.key, STEP):
                spent = max(event.cpu_time_total, event.device_time_total)
                self.stages[name] = spent / 1000 / _TRACED

    def rows(self) -> list[Row]:
        """Per stage: ms a step, achieved GFLOP/s and GB/s; last the whole step."""
        table: list[Row] = []
        for name, spent in self.stages.items():
            per = max(spent, 1e-6) * 1e6
            table.append(
                (name, spent, self.counter.flops[name] / per, self.counter.bytes[name] / per)
            )
        whole = max(self.seconds, 1e-9) * 1e9
        table.append((
            STEP, self.seconds * 1e3, sum(self.counter.flops.values()) / whole,
            sum(self.counter.bytes.values()) / whole,
        ))  # fmt: skip
        return table


def _trace(on_gpu: bool) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


class Profiles:
    """Profiles the first call of every period.

    Args:
        folder: for the traces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, StepProfiler] = {}

    def watch(self, name: str, then: OnStep | None) -> OnStep | None:
        """What to pass as ``on_step`` to the period ``name``, right before it starts."""
        if name in self.made:
            return then
        self.made[name] = StepProfiler(self.folder, name, then)
        return self.made[name].start()

    def rows(self) -> dict[str, list[Row]]:
        """Every period's table; periods too short to be timed are left out."""
        return {name: made.rows() for name, made in self.made.items() if made.seconds}
