"""The device: its tensors, its memory, and how it does one operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from emulated_cuda.graphs import Graph

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten

# Operations whose result the host reads: it waits for the GPU.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.unique_dim.default, aten.bincount.default,
    aten.unique_consecutive.default,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip
COPIES = {aten.copy_.default, aten._to_copy.default}


class CudaTensor(torch.Tensor):
    """Says that it lies on ``cuda:0``.

    Attributes:
        inner: the numbers, on the CPU.
        held: lets go of their memory.
    """

    inner: Tensor
    held: Callable[[], object]

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        # To C++ a tensor of the CPU: with CUDA's name it would ask the driver for streams.
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CPU,
        )  # fmt: skip
        made.inner = inner
        made.held = CARD.memory.used_by(made)
        return made

    def become(self, other: CudaTensor) -> None:
        """``self.data = other``, Python's half of it."""
        self.held()
        self.inner = other.inner
        self.held = CARD.memory.used_by(self)

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        CARD.wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with below():
            inner = self.inner.clone()
        made: Any = CudaTensor(inner).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CARD.run(func, args, kwargs or {})


def on_card(value: Any) -> bool:
    """Whether a value is a tensor of the emulated device."""
    return isinstance(value, CudaTensor)


def tensors(*values: Any) -> list[Tensor]:
    """Every tensor in nested values."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@contextmanager
def below() -> Iterator[None]:
    """Inside, operations are the CPU's own."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


class Memory:
    """Bytes that live tensors hold, by pool; None is the pool outside of captures.

    Attributes:
        now, peak: bytes by pool.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.now: Counter[Any] = Counter()
        self.peak: Counter[Any] = Counter()
        self._stores: dict[int, list[Any]] = {}  # pool, bytes, tensors over it

    def used_by(self, tensor: CudaTensor) -> Callable[[], object]:
        """Count a tensor's storage for as long as any tensor lives that lies in it."""
        storage = tensor.inner.untyped_storage()
        key = storage._cdata
        if key not in self._stores:
            self._stores[key] = [self.pool, storage.nbytes(), 0]
            self.now[self.pool] += storage.nbytes()
            self.peak[self.pool] = max(self.peak[self.pool], self.now[self.pool])
        self._stores[key][2] += 1
        return weakref.finalize(tensor, self._left, key)

    def _left(self, key: int) -> None:
        self._stores[key][2] -= 1
        if not self._stores[key][2]:
            pool, size, _ = self._stores.pop(key)
            self.now[pool] -= size


class Card:
    """What the device is doing.

    Attributes:
        capturing: the graph that is captured.
        strict: waiting is an error (``torch.cuda.set_sync_debug_mode("error")``).
        waits: how often the host waited, for results or for a copy from its pageable memory.
        host_call: the call from Python that is under way has no tensor of this device.
    """

    def __init__(self) -> None:
        self.capturing: Graph | None = None
        self.strict = False
        self.waits = 0
        self.host_call = False
        self.memory = Memory()

    def wait(self, what: str) -> None:
        """The host waits for the GPU."""
        self.waits += 1
        if self.capturing is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {what}"
            )
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation as torch's dispatcher hands it over."""
        given = tensors(args, kwargs)
        here = [tensor for tensor in given if on_card(tensor)]
        if not here and (given or self.host_call):
            with below():
                return func(*args, **kwargs)
        self._look_for_waiting(func, args, given)
        own = {id(tensor.inner): tensor for tensor in here}
        numbers = {id(tensor) for tensor in given if not on_card(tensor)}
        args, kwargs = (tree_map(_unwrapped, part) for part in (args, kwargs))
        with below():
            if self.capturing is not None:
                self.capturing.before(func, args, kwargs)
            found = func(*args, **kwargs)
            if self.capturing is not None:
                self.capturing.after(func, args, kwargs, found, numbers)
        if func is aten.copy_.default and id(args[0]) not in own:
            return given[0]

        def wrapped(value: Any) -> Any:
            # An operation in place returns the tensor that it was given.
            if id(value) in own:
                same = own[id(value)]
                if (same.shape, same.stride()) != (value.shape, value.stride()):
                    with torch._C.DisableTorchFunction():  # as_strided_ and the like
                        same.data = CudaTensor(value)
                return same
            return CudaTensor(value) if isinstance(value, Tensor) else value

        return tree_map(wrapped, found)

    def _look_for_waiting(self, func: Any, args: Any, given: list[Tensor]) -> None:
        if func in WAITING:
            self.wait(str(func))
        if func in INDEXING:
            for index in tensors(args[1]):
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("a mask, counted for its size")
                elif not on_card(index):
                    self.wait("an index copied from pageable memory")
        if func in COPIES and len({on_card(tensor) for tensor in given}) == 2:
            self.wait("a copy from pageable memory" if on_card(given[0]) else "a copy to the host")
        if self.capturing is not None and torch.Tag.nondeterministic_seeded in func.tags:
            raise NotImplementedError(f"{func} draws random numbers in a capture")


def _unwrapped(value: Any) -> Any:
    return value.inner if on_card(value) else value


CARD = Card()
