"""Nested entries of a ``.pth`` in a safetensors file, without what the target's weights tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiop_fast.runtime.files import load_tensors, save_tensors

_PREFIX = "modelB."  # where a checkpoint keeps model A


def write_remainder(path: Path, content: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Write ``content``; tensors equal to the target's are left out and named."""
    tensors: dict[str, Tensor] = {}
    known = {f"{_PREFIX}{key}": value.detach().cpu() for key, value in model.items()}

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            same = known.get(key)
            if same is not None and same.dtype == value.dtype and torch.equal(same, value):
                return {"target": key[len(_PREFIX) :]}
            tensors[f"t{len(tensors)}"] = value.detach().clone()
            return {"tensor": f"t{len(tensors) - 1}"}
        if isinstance(value, Mapping):
            return {"dict": [[k, plain(v, str(k))] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [plain(v, "") for v in value]}
        return value

    save_tensors(path, tensors, {"content": plain(content, "")})


def read_remainder(path: Path, model: Mapping[str, Tensor]) -> dict[str, Any]:
    """What :func:`write_remainder` was given, tensors equal in every bit."""
    tensors, facts = load_tensors(path)

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "target":
            return model[inner].detach().cpu().contiguous()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {k: whole(v) for k, v in inner}
        items = [whole(v) for v in inner]
        return items if kind == "list" else tuple(items)

    content: dict[str, Any] = whole(facts["content"])
    return content
