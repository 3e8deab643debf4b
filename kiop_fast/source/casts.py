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
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # autocast leaves doubles alone


class FrozenCasts:
    """The narrow copies of a frozen model's weights, kept from call to call.

    Autocast keeps casts of trainable weights alone, and casts those of frozen ones at every call:
    in a prompt step of ResNet-18 88 of 536 operations (``python benchmarks/captured.py
    --precision bf16``).  A captured graph knows the copies by address, so they stay as long as the
    weights do.  Not while another thread runs the model.

    Args:
        model: nothing in it changes in place; it may be moved.
        others: of a model of the same modules and weights; both keep one set of copies.
    """

    def __init__(self, model: nn.Module, others: FrozenCasts | None = None) -> None:
        self._layers = [module for module in model.modules() if type(module) in _LAYERS]
        self._casts: dict[tuple[int, str, torch.dtype], tuple[object, nn.Parameter]] = (
            {} if others is None else others._casts
        )

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Inside, the weights are what autocast would make of them on ``device``; else as ever."""
        available = torch.amp.is_autocast_available(device.type)
        if not available or not torch.is_autocast_enabled(device.type):
            yield
            return
        dtype, replaced = torch.get_autocast_dtype(device.type), []
        for place, layer in enumerate(self._layers):
            for name in ("weight", "bias"):
                own = layer._parameters.get(name)
                if own is None or own.requires_grad or own.dtype not in _FLOATS:
                    continue
                if own.dtype != dtype:
                    replaced.append((layer, name, own, self._cast((place, name, dtype), own)))
        try:
            for layer, name, _, narrow in replaced:
                layer._parameters[name] = narrow
            yield
        finally:
            for layer, name, own, _ in replaced:
                layer._parameters[name] = own

    def _cast(self, key: tuple[int, str, torch.dtype], own: Tensor) -> nn.Parameter:
        version = None if own.is_inference() else own._version
        state = (own.data_ptr(), version, own.stride())
        known = self._casts.get(key)
        if known is None or known[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # later calls may want gradients
                narrow = nn.Parameter(own.detach().to(key[2], copy=True), requires_grad=False)
            known = self._casts[key] = (state, narrow)
        return known[1]
