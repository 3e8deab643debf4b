"""The emulated device under torch's names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from emulated_cuda.calls import Operations, PythonCalls
from emulated_cuda.card import CARD
from emulated_cuda.graphs import Capture, Graph


class Stream:
    """Everything runs in the order in which it is called."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def is_capturing(self) -> bool:
        return CARD.capturing is not None

    def synchronize(self) -> None:
        CARD.wait("synchronize")


class Event:
    """A moment of the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        CARD.wait("synchronize")

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class _Autocast(torch.autocast):
    """To C++ the device's tensors are the CPU's, and so is their autocast."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(_of_the_cpu(device_type), *args, **kwargs)


def _of_the_cpu(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


def _asked_of_the_cpu(function: Any) -> Any:
    return lambda device_type="cpu": function(_of_the_cpu(device_type))


def _set_sync_debug_mode(mode: Any) -> None:
    CARD.strict = mode in ("error", 2)


_PROPERTIES = SimpleNamespace(
    name="emulated", major=9, minor=0, total_memory=8 << 30, multi_processor_count=4,
    max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
)  # fmt: skip

_CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": _nothing,
    "get_device_name": lambda *_: _PROPERTIES.name,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _PROPERTIES,
    "mem_get_info": lambda *_: (6 << 30, 8 << 30),
    "max_memory_reserved": lambda *_: CARD.memory.peak.total(),
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),  # one generator, the CPU's
    "set_rng_state": lambda *_: None,
    "synchronize": lambda *_: CARD.wait("synchronize"),
    "Stream": Stream,
    "stream": _nothing,
    "Event": Event,
    "current_stream": lambda *_: Stream(),
    "is_current_stream_capturing": lambda: CARD.capturing is not None,
    "CUDAGraph": Graph,
    "graph": Capture,
    "graph_pool_handle": object,
    "get_sync_debug_mode": lambda: 2 if CARD.strict else 0,
    "set_sync_debug_mode": _set_sync_debug_mode,
}


def install() -> None:
    """From now on, in this thread, torch has the emulated device."""
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = lambda *_: Stream()  # type: ignore[assignment]
    torch.autocast = _Autocast  # type: ignore[misc]
    torch.is_autocast_enabled = _asked_of_the_cpu(torch.is_autocast_enabled)
    torch.get_autocast_dtype = _asked_of_the_cpu(torch.get_autocast_dtype)
    plain = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with PythonCalls():  # torch turns a mode off inside its own handler
            return plain(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    PythonCalls().__enter__()
    Operations().__enter__()
