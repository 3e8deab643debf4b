"""What Python calls, seen before C++ looks at devices: factories, moves, mixed devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from emulated_cuda.card import CARD, CPU, CUDA, CudaTensor, below, on_card, tensors

MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)
FROM_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)
# Tensors of the host may be given beside those of the device.
MIXED = (Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_)
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
PROPERTIES = ("__get__", "__set__")


class Operations(TorchDispatchMode):
    """Operations without a tensor argument, in the midst of which C++ makes new ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CARD.run(func, args, kwargs or {})


class PythonCalls(TorchFunctionMode):
    """Every call of a torch function from Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MOVES:
            return _moved(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)  # all host memory is alike
        given = tensors(args, kwargs)
        here = any(map(on_card, given))
        if func is torch._has_compatible_shallow_copy_type and here:
            return on_card(args[0]) == on_card(args[1])  # else a module gets new parameters
        if func == SET_DATA and here:
            args[0].become(args[1])
        if func is Tensor.new_tensor and here:
            kwargs.setdefault("device", CUDA)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return _made(func, args, kwargs | {"device": CPU}, here)
        if here:
            _check_devices(func, given)
        return _called(func, args, kwargs, host=not here)


def _called(func: Any, args: Any, kwargs: Any, *, host: bool) -> Any:
    before, CARD.host_call = CARD.host_call, host
    try:
        return func(*args, **kwargs)
    finally:
        CARD.host_call = before


def _made(func: Any, args: Any, kwargs: Any, here: bool) -> Any:
    """What a factory makes on the device."""
    if func in FROM_NUMBERS:
        CARD.wait("a copy from pageable memory")
    if CARD.capturing is not None and func in RANDOM:
        raise NotImplementedError(f"{func} draws random numbers in a capture")
    made = _called(func, args, kwargs, host=not here)
    if on_card(made):
        return made
    if CARD.capturing is not None:
        with below():
            CARD.capturing.constant(made.detach())
    return CudaTensor(made.detach()).requires_grad_(made.requires_grad)


def _check_devices(func: Any, given: list[Tensor]) -> None:
    name = getattr(func, "__name__", str(func))
    if func in MIXED or name in PROPERTIES:
        return
    if any(not on_card(tensor) and tensor.dim() > 0 for tensor in given):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name})"
        )


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Tensor.to, Tensor.cuda and Tensor.cpu."""
    copy, layout = kwargs.pop("copy", False), {}
    if "memory_format" in kwargs:
        layout["memory_format"] = kwargs.pop("memory_format")
    other = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    device, dtype = tensor.device, tensor.dtype
    if func is not Tensor.to:
        device = CUDA if func is Tensor.cuda else CPU
    elif other is not None:
        device, dtype = other.device, other.dtype
    else:
        found_device, found_dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = found_device or device, found_dtype or dtype
    if device.type not in ("cpu", "cuda"):
        return func(tensor.inner if on_card(tensor) else tensor, device, dtype, copy=copy)
    there = device.type == "cuda"
    if there == on_card(tensor):
        return _called(Tensor.to, (tensor, dtype), {"copy": copy, **layout}, host=not there)
    if there:
        CARD.wait("a copy from pageable memory")
        copied = _called(Tensor.to, (tensor, dtype), {"copy": True, **layout}, host=True)
        return _Up.apply(copied)
    CARD.wait("a copy to the host")
    return _Down.apply(Tensor.to(tensor, dtype, copy=True, **layout))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Any:
        return CudaTensor(tensor.detach())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.inner


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.inner.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return CudaTensor(grad.detach())
