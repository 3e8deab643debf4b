"""Under autocast a frozen weight is cast once, not at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Layers that do nothing with weight and bias but multiply and add; others are autocast's.
_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


class FrozenCasts:
    """The narrow copies of a frozen model's weights, kept from call to call.

    Autocast keeps casts of trainable weights alone, and casts those of frozen ones at every call:
    for ResNet-18 an eighth of the bytes that a prompt step moves.

    Args:
        model: nothing in it changes in place; it may be moved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if type(module) in _LAYERS]
        self._casts: dict[tuple[int, str, torch.dtype], tuple[object, nn.Parameter]] = {}

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Inside, the weights are what autocast would make of them on ``device``; else as ever."""
        if not torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling():
            yield
            return
        dtype, replaced = torch.get_autocast_dtype(device.type), []
        for place, layer in enumerate(self._layers):
            for name, parameter in layer._parameters.items():
                if parameter is None or parameter.requires_grad or parameter.dtype == dtype:
                    continue
                replaced.append((layer, name, parameter))
                layer._parameters[name] = self._cast((place, name, dtype), parameter)
        try:
            yield
        finally:
            for layer, name, parameter in replaced:
                layer._parameters[name] = parameter

    def _cast(self, key: tuple[int, str, torch.dtype], parameter: Tensor) -> nn.Parameter:
        state = (parameter.data_ptr(), parameter._version, parameter.stride())
        known = self._casts.get(key)
        if known is None or known[0] != state:
            narrow = parameter.detach().to(key[2])
            known = self._casts[key] = (state, nn.Parameter(narrow, requires_grad=False))
        return known[1]
