"""Optimiser and module state as flat tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """``{prefix}.{parameter index}.{name}`` → tensor, for every buffer the optimiser keeps."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": value
        for index, buffers in state.items()
        for name, value in buffers.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Give back what :func:`optimizer_tensors` took; in place where the state is there already.

    What is there keeps its address, which captured steps know, and the layout of its parameter,
    which fused optimisers ask for.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key[len(prefix) + 1 :].split(".")
            state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    names = {place: set(buffers) for place, buffers in state.items()}
    if names != {place: set(buffers) for place, buffers in whole["state"].items()}:
        optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        return
    for place, buffers in state.items():
        for name, value in buffers.items():
            whole["state"][place][name].copy_(value)


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """``{prefix}.{name}`` → tensor, for every parameter and buffer."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give back what :func:`module_tensors` took."""
    start = len(prefix) + 1
    module.load_state_dict(
        {key[start:]: value for key, value in tensors.items() if key.startswith(prefix + ".")}
    )
