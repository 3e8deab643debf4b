"""A step over tensors that stay where they are: called on the CPU, replayed as a graph on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kiop_fast.errors import GraphError

_WARM_UP = 3  # steps before a capture: lazy initialisation, cudnn's choice of algorithms


class StaticStep:
    """One step, run the way its device runs it best.

    The body reads and writes tensors whose storage never changes, draws nothing, never looks at a
    number on the host.  On CUDA its first call warms it up on a side stream, gives back what that
    changed, captures it once and from then on replays.

    Args:
        body: the step.
        state: every tensor that the step changes and that the next one depends on.
        device: of these tensors.
        graphs: capture on CUDA; elsewhere the body is simply called.

    Attributes:
        captures: graphs made, 0 or 1.

    Raises:
        GraphError: on the first call, the body cannot be captured.
    """

    def __init__(
        self,
        body: Callable[[], None],
        state: Callable[[], Iterable[Tensor]],
        device: torch.device,
        graphs: bool = True,
    ) -> None:
        self.body, self.state = body, state
        self.graphed = graphs and device.type == "cuda"
        self.captures = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.graphed:
            self.body()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [tensor.detach().clone() for tensor in self.state()]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.body()
        current.wait_stream(side)
        with torch.no_grad():
            for tensor, value in zip(self.state(), before, strict=True):
                tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.body()
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise GraphError(
                "the step cannot be captured as a CUDA graph",
                got=str(error).splitlines()[0],
                expected="operations that neither wait for the GPU nor copy from pageable memory",
                fix="run with --no-graphs (graphs=false); the operation is in the traceback",
            ) from error
        self.captures += 1
        return graph


def hold(held: dict[str, Tensor], device: torch.device, **tables: Tensor | None) -> None:
    """Copy a period's tables to where a step reads them; where the shape stays, in place.

    Args:
        held: by name; changed.
        tables: the new ones; None takes a table away.
    """
    for name, table in tables.items():
        old = held.get(name)
        if table is None:
            held.pop(name, None)
        elif old is not None and old.shape == table.shape:
            old.copy_(table)
        else:
            held[name] = table.to(device, copy=True)


def row_of(table: Tensor, at: Tensor) -> Tensor:
    """Row ``at`` (0-d, on the table's device) of a table, without looking at ``at`` on the host."""
    return table.index_select(0, at.view(1))[0]
