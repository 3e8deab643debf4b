"""A step over tensors that stay where they are: called on the CPU, replayed as a graph on CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kiop_fast.errors import GraphError
from kiop_fast.runtime.profile import STEP, stage

Body = Callable[[], None]
State = Callable[[], Iterable[Tensor]]

_REHEARSALS = 3  # before a capture: lazy initialisation, cudnn's choice of algorithms

# Up to torch 2.11 a capture that failed leaves the allocator with a reference to its graph.
_broken: list[torch.cuda.CUDAGraph] = []


class Scratch:
    """Stream and memory pool of captures, of one run's or of one owner's.

    Its graphs never run at the same time and leave nothing behind but their static tensors, so
    they can lie on top of each other.

    Args:
        device: a GPU; nothing is made before the first capture.
        frugal: while a step is rehearsed the state it starts from is kept in host memory.
    """

    def __init__(self, device: torch.device, *, frugal: bool = False) -> None:
        self.device, self.frugal = device, frugal

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where a step is rehearsed and captured: autograd keeps nodes of no other stream."""
        return torch.cuda.Stream(self.device)

    @cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


class StaticStep:
    """One step, run the way its device runs it best.

    The body reads and writes tensors whose storage never changes, draws nothing, never looks at a
    number on the host.  On CUDA its first call rehearses it on a side stream, captures it once and
    from then on replays.

    Args:
        body: the step.
        state: every tensor that the step changes and that the next one depends on.
        device: of these tensors.
        graphs: capture on CUDA; elsewhere the body is simply called.
        scratch: shared with the owner's other steps; by default its own.

    Attributes:
        captures: graphs made, 0 or 1.

    Raises:
        GraphError: on the first call, the body cannot be captured.
    """

    def __init__(
        self, body: Body, state: State, device: torch.device, graphs: bool = True,
        scratch: Scratch | None = None,
    ) -> None:  # fmt: skip
        self.body, self.state, self.device = body, state, device
        self.graphed = graphs and device.type == "cuda"
        self.captures = 0
        self._scratch = scratch or Scratch(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.graphed:
            with stage(STEP):
                self.body()
            return
        if self._graph is None:
            with torch.cuda.device(self.device):
                self._graph = self._capture()
            self.captures += 1
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        current, side = torch.cuda.current_stream(), self._scratch.stream
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            # Once everything is in its place, what waits is found before it breaks a capture.
            rehearse(self.body, self.state, _REHEARSALS, _no_waiting, on_host=self._scratch.frugal)
            try:
                # Loaders may work in threads of their own meanwhile.
                whole = torch.cuda.graph(
                    graph, self._scratch.pool, side, capture_error_mode="thread_local"
                )
                with _explained(), whole:
                    self.body()
            except BaseException:
                abandon(graph, self._scratch)
                raise
        current.wait_stream(side)
        return graph


def rehearse(
    body: Body, state: State, times: int, around_last: Callable[[], Any] = nullcontext,
    *, on_host: bool = False,
) -> None:  # fmt: skip
    """Call ``body`` so many times, always from the present state, which it is left in.

    Args:
        around_last: makes the context of the last call.
        on_host: the state is kept in host memory meanwhile, not on its device.
    """
    before = [_copy(tensor, on_host) for tensor in state()]
    for left in reversed(range(times)):
        with _disable_current_modes(), nullcontext() if left else around_last():
            body()
        with torch.no_grad():
            for tensor, value in zip(state(), before, strict=True):
                tensor.copy_(value)


def _copy(tensor: Tensor, on_host: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if on_host else tensor.detach().clone()


def abandon(graph: torch.cuda.CUDAGraph, scratch: Scratch) -> None:
    """After a capture that failed: memory comes from where it came from before."""
    _broken.append(graph)
    with suppress(RuntimeError):
        torch.cuda.synchronize()
    with suppress(RuntimeError, AttributeError):  # newer versions have done it
        index = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(index, scratch.pool)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        with _explained():
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _explained() -> Iterator[None]:
    """Inside, what torch says against a capture becomes a GraphError; not a lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        raise GraphError(
            "the step cannot be captured as a CUDA graph",
            got=str(first).splitlines()[0],
            expected="operations that neither wait for the GPU nor copy from pageable memory",
            fix="run with --no-graphs (graphs=false); the operation is in the traceback",
        ) from error


def hold(held: dict[str, Tensor], device: torch.device, **tables: Tensor | None) -> None:
    """Copy a period's tables to where a step reads them; in place where they fit.

    A table of rows a step, which may be fewer than those before, fits in the first of them.

    Args:
        held: by name; changed.
        tables: the new ones; None takes a table away.
    """
    for name, table in tables.items():
        old = held.get(name)
        if table is None:
            held.pop(name, None)
        elif old is not None and _fits(table, old):
            old[: len(table)].copy_(table)
        else:
            held[name] = table.to(device, copy=True)


def _fits(table: Tensor, old: Tensor) -> bool:
    if table.ndim < 2:
        return table.shape == old.shape
    return table.shape[1:] == old.shape[1:] and len(table) <= len(old)


def row_of(table: Tensor, at: Tensor) -> Tensor:
    """Row ``at`` (0-d, on the table's device) of a table, without looking at ``at`` on the host."""
    return table.index_select(0, at.view(1))[0]
