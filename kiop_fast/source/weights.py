"""Read a file of weights without running anything it contains, and fit it to a model."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kiop_fast.errors import SourceError

_SHOWN = 5  # keys of each kind listed in an error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key and the header's facts (empty for a torch file).

    Raises:
        SourceError: the file is missing, truncated, or holds more than tensors by key.
    """
    if not path.is_file():
        raise SourceError("no such file of weights", got=path, expected="a .safetensors file or "
                          "a torch state dict", fix="check the path")  # fmt: skip
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("kiop_fast", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(path, error, "a whole safetensors file") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # about pickle protocols, which the errors below cover
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.stat().st_size and "Weights only" in str(error):
            raise _no_state_dict(path, "a pickle with other objects than tensors") from None
        raise _damaged(path, error, "a whole torch file") from None
    except Exception as error:  # a broken pickle can raise anything
        raise _damaged(path, error, "a whole torch file") from None
    if not isinstance(found, Mapping):
        raise _no_state_dict(path, f"a {type(found).__name__}")
    others = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if others or not found or not all(isinstance(key, str) for key in found):
        raise _no_state_dict(path, f"a dict with entries {_short(others or found)}")
    return dict(found)


def _damaged(path: Path, error: Exception, expected: str) -> SourceError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return SourceError(f"the weights in {path.name} cannot be read", got=f"{path}: {first[:200]}",
                       expected=expected, fix="the file is truncated or damaged; copy or save it "
                       "again")  # fmt: skip


def _no_state_dict(path: Path, got: str) -> SourceError:
    return SourceError(
        f"{path.name} is no plain state dict, and nothing else is ever unpickled",
        got=got,
        expected="a dict of tensors by parameter name",
        fix="where you trust the file: torch.save(model.state_dict(), 'weights.pth')",
    )


def fit_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, name: str, classes: int
) -> None:
    """Load ``weights`` into ``model``; every key must be there, with its shape.

    Raises:
        SourceError: another class count, another architecture, or values that are not finite.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    # Old torch versions did not count batches; the count is not used in a frozen model.
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in wanted]
    shaped = [k for k in wanted if k in given and wanted[k] != given[k]]
    if not missing and not extra and shaped and _only_the_classifier(model, shaped):
        raise SourceError(
            f"the weights given for {name} are for another number of classes",
            got=f"{given[shaped[0]][0]} classes in the file",
            expected=f"{classes} classes",
            fix="name the dataset the model was trained on: NAME@DATA=PATH",
        )
    if missing or extra or shaped:
        wrong = [f"{k} {given[k]} instead of {wanted[k]}" for k in shaped]
        raise SourceError(
            f"the weights given are not those of {name}",
            got=f"missing {_short(missing)}; extra {_short(extra)}; wrong shape {_short(wrong)}",
            expected=f"the {len(wanted)} tensors of {name}",
            fix="name the architecture the file was saved from",
        )
    bad = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise SourceError(f"the weights given for {name} are not finite", got=_short(bad),
                          expected="finite numbers", fix="use an intact checkpoint")  # fmt: skip
    model.load_state_dict(weights, strict=False)


def _only_the_classifier(model: nn.Module, keys: Iterable[str]) -> bool:
    """Whether all ``keys`` belong to the layer that makes the logits, the last with weights."""
    last = [key.rpartition(".")[0] for key, _ in model.named_parameters()][-1]
    return all(key.rpartition(".")[0] == last for key in keys)


def _short(keys: Iterable[Any]) -> str:
    listed = [str(key) for key in keys]
    if not listed:
        return "none"
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
