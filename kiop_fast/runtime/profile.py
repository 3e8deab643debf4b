"""Where the time of a step goes: named stages, their operations counted, their time traced."""

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

_TRACED = 5  # steps
_SKIPPED = 3  # before them: one is counted, two settle
_stages = ["other"]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark the operations inside as one stage of a step."""
    _stages.append(name)
    try:
        with torch.profiler.record_function(f"stage/{name}"):
            yield
    finally:
        _stages.pop()


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

    The first step is counted, five later ones are traced to ``folder/<name>.json`` (open it in
    chrome://tracing or Perfetto).  A step that replays a CUDA graph shows its kernels, not its
    stages.

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
        if done == _SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if total.is_cuda:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.__enter__()
            self._began = time.perf_counter()
        elif done == _SKIPPED + _TRACED and self._trace is not None:
            if total.is_cuda:
                torch.cuda.synchronize()
            self.seconds = (time.perf_counter() - self._began) / _TRACED
            self._trace.__exit__(None, None, None)
            self._trace.export_chrome_trace(str(self.path))
            for event in self._trace.key_averages():
                if event.key.startswith("stage/"):
                    spent = max(event.cpu_time_total, event.device_time_total)
                    self.stages[event.key[6:]] = spent / 1000 / _TRACED
        if self.then is not None:
            self.then(done, total)

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
            "step", self.seconds * 1e3, sum(self.counter.flops.values()) / whole,
            sum(self.counter.bytes.values()) / whole,
        ))  # fmt: skip
        return table


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
        """Every period's table; periods too short to be traced are left out."""
        return {name: made.rows() for name, made in self.made.items() if made.seconds}
