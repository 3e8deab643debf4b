"""Tensors that wait in host memory while others have their place on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 512  # bytes; torch's allocator on CUDA does the same


class SharedPlace:
    """Memory of a device that tenants have in turns, one at a time.

    It is made when the first tenant enters, as large as the largest of them, and stays where it is,
    so that captured steps find their tensors again.

    Args:
        device: of the place; the tensors of absent tenants lie in host memory, page-locked.

    Attributes:
        present: who has the place.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.present: Tenant | None = None
        self._tenants: list[Tenant] = []

    def join(self, tensors: Sequence[Tensor]) -> Tenant:
        """Take the memory of contiguous tensors; their values wait until their tenant enters.

        Until somebody has entered they keep shape and dtype, and no memory.

        Raises:
            RuntimeError: a tenant has entered already.
        """
        if self.present is not None:
            raise RuntimeError("a place that is in use cannot grow: join it before")
        tenant = Tenant(self, tensors)
        self._tenants.append(tenant)
        return tenant

    def make(self) -> None:
        """The memory; every tenant's tensors are views of it from now on."""
        size = max(tenant.bytes for tenant in self._tenants)
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for tenant in self._tenants:
            tenant.settle(memory)


class Tenant:
    """Tensors whose values lie in host memory while others are present.

    Attributes:
        bytes: of all of them, with what aligns them.
    """

    def __init__(self, place: SharedPlace, tensors: Sequence[Tensor]) -> None:
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        *self._offsets, self.bytes = itertools.accumulate(sizes, initial=0)
        self._place, self._tensors = place, list(tensors)
        self._there: Tensor | None = None
        locked = place.device.type == "cuda"
        self._host = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=locked)
        for kept, tensor in zip(self._views(self._host), tensors, strict=True):
            kept.copy_(tensor.detach())
            tensor.data = tensor.new_empty(()).expand(tensor.shape)

    def enter(self) -> None:
        """From now on the tensors hold their own values; those of who was present wait."""
        before = self._place.present
        if before is self:
            return
        if before is None:
            self._place.make()
        else:
            before._copy(before._there, before._host)
        self._copy(self._host, self._there)
        self._place.present = self

    def settle(self, memory: Tensor) -> None:
        """The tensors become views of the place."""
        self._there = memory[: self.bytes]
        for tensor, view in zip(self._tensors, self._views(memory), strict=True):
            tensor.data = view

    @staticmethod
    def _copy(source: Tensor | None, to: Tensor | None) -> None:
        assert source is not None
        assert to is not None
        to.copy_(source, non_blocking=True)  # both ways on one stream: the host reads neither

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for at, tensor in zip(self._offsets, self._tensors, strict=True)
        ]
