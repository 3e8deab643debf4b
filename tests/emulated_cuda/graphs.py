"""Graphs: captured operations, done again at every replay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from emulated_cuda.card import CARD, below, tensors


class Foreign:
    """A tensor in memory that others keep, or give back."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.place = tensor.storage_offset(), tensor.size(), tensor.stride()

    def take(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(
                f"a replay reads memory that was given back: {self.dtype}, {tuple(self.place[1])}"
            )
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``.

    As on a GPU a capture does nothing but note operations down; what they made holds rubbish until
    the first replay.

    Attributes:
        calls: (operation, arguments, keyword arguments, where its new results go).
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # made by operations of this graph
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operation is captured that may write: remember what was there."""
        for tensor in written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def after(
        self, func: Any, args: Any, kwargs: Any, found: Any, by_value: Collection[int]
    ) -> None:
        """Note an operation down.

        Args:
            by_value: ids of numbers on the host, which are arguments of a kernel.
        """

        def held(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) in by_value:
                return value
            own = value.untyped_storage().data_ptr() in self._own
            return value if own else Foreign(value)

        places = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
        made = [
            None if out.untyped_storage().data_ptr() in places else out for out in tensors(found)
        ]
        self.calls.append((func, tree_map(held, args), tree_map(held, kwargs), made))
        self._keep(made)

    def constant(self, tensor: Tensor) -> None:
        """A factory made ``tensor``."""
        value = tensor.clone()
        self.calls.append((lambda: value, (), {}, [tensor]))
        self._keep([tensor])

    def _keep(self, made: list[Tensor | None]) -> None:
        for out in made:
            if out is not None:
                self._own[out.untyped_storage().data_ptr()] = out.untyped_storage()

    def end(self) -> None:
        """The capture is over: nothing has been done."""
        with below():
            for storage, value in self._before.values():
                storage.copy_(value)
            for storage in self._own.values():
                storage.fill_(0xFF)  # NaN and -1
        self._before.clear()

    def replay(self) -> None:
        if CARD.capturing is not None:
            raise RuntimeError("a graph is replayed while another is captured")
        with torch.no_grad(), below():
            for func, args, kwargs, made in self.calls:
                found = tree_leaves(func(*tree_map(_taken, args), **tree_map(_taken, kwargs)))
                results = [out for out in found if isinstance(out, Tensor)]
                for place, result in zip(made, results, strict=True):
                    if place is not None:
                        place.copy_(result)

    def reset(self) -> None:
        self.calls.clear()


def _taken(value: Any) -> Any:
    return value.take() if isinstance(value, Foreign) else value


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes; BatchNorm's running statistics no schema names."""
    found = tensors(args[3:5]) if func is torch.ops.aten.native_batch_norm.default else []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[k] if k < len(args) else kwargs.get(argument.name))
    return found


class Capture:
    """Stands for ``torch.cuda.graph``."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self.graph, self.pool = graph, graph if pool is None else pool

    def __enter__(self) -> None:
        if CARD.capturing is not None:
            raise RuntimeError("a capture is under way")
        CARD.capturing, CARD.memory.pool = self.graph, self.pool

    def __exit__(self, *_: Any) -> None:
        CARD.capturing = CARD.memory.pool = None
        self.graph.end()
