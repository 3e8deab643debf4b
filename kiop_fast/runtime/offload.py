"""Tensors that wait in host memory while others have their place on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 512  # bytes; torch's allocator on CUDA does the same


class SharedPlace:
    """Memory of a device that tenants have in turns, one at a time.

    It is as large as the largest tenant's tensors, which are views of it.  Its address never
    changes once a tenant has entered, so that captured steps find their tensors again.

    Args:
        device: of the place; the tensors of absent tenants lie in host memory, page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.present: Tenant | None = None
        self._tenants: list[Tenant] = []
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def join(self, tensors: Sequence[Tensor]) -> Tenant:
        """Give ``tensors`` (contiguous, on the device) this place.  They hold rubbish until their
        tenant enters.

        Raises:
            RuntimeError: they do not fit, and a tenant has entered already.
        """
        tenant = Tenant(self, tensors)
        self._tenants.append(tenant)
        moved = [tenant]
        if tenant.bytes > len(self._memory):
            if self.present is not None:
                raise RuntimeError("a place that is in use cannot grow: join it before")
            self._memory = torch.empty(tenant.bytes, dtype=torch.uint8, device=self.device)
            moved = self._tenants
        for each in moved:
            each._settle(self._memory)
        return tenant


class Tenant:
    """Tensors whose values lie in host memory while others are present.

    Attributes:
        bytes: of all of them, with what aligns them.
    """

    def __init__(self, place: SharedPlace, tensors: Sequence[Tensor]) -> None:
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        *self._offsets, self.bytes = itertools.accumulate(sizes, initial=0)
        self._place, self._tensors = place, list(tensors)
        self._there = torch.empty(0, dtype=torch.uint8)
        self._host = torch.empty(self.bytes, dtype=torch.uint8)
        if place.device.type == "cuda":
            self._host = self._host.pin_memory()
        for kept, tensor in zip(self._views(self._host), tensors, strict=True):
            kept.copy_(tensor.detach())

    def enter(self) -> None:
        """From now on the tensors hold their own values; those of who was present wait."""
        before = self._place.present
        if before is self:
            return
        if before is not None:
            before._host.copy_(before._there, non_blocking=True)
        self._there.copy_(self._host, non_blocking=True)
        self._place.present = self

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for at, tensor in zip(self._offsets, self._tensors, strict=True)
        ]

    def _settle(self, memory: Tensor) -> None:
        self._there = memory[: self.bytes]
        for tensor, view in zip(self._tensors, self._views(memory), strict=True):
            tensor.data = view
