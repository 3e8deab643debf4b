"""Source models on disk: one safetensors file with the facts about model and data in its header."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.data import BUILT_IN, DatasetInfo
from kiop_fast.errors import KiopError, SourceError
from kiop_fast.runtime.files import save_tensors
from kiop_fast.source.frozen import Source, fingerprint, freeze
from kiop_fast.source.known import combine, strip_prefixes
from kiop_fast.source.schemes import SCHEMES, Scheme
from kiop_fast.source.spec import SourceSpec
from kiop_fast.source.weights import fit_weights, read_weights
from kiop_fast.source.zoo import probe

FORMAT = "kiop_fast source"
VERSION = 1


def save_source(
    path: Path, model: nn.Module, *, arch: str, info: DatasetInfo, side: int,
    accuracy: float | None, extra: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a trained model and its facts, atomically.

    Args:
        path: the file; its folder is made.
        arch: name in the zoo.
        info: facts about the data it was trained on.
        side: image side it was trained at, pixels.
        accuracy: on that data's test split; None if unknown.
        extra: whatever else should be remembered (JSON values).
    """
    facts = {
        "format": FORMAT, "version": VERSION, "arch": arch, "data": asdict(info), "side": side,
        "accuracy": accuracy, "sha256": fingerprint(model), "extra": dict(extra or {}),
    }  # fmt: skip
    save_tensors(path, model.state_dict(), facts)
    return path


def load_source(spec: SourceSpec, *, sides: Sequence[int], device: torch.device) -> Source:
    """Build, load, check and freeze the model that ``spec`` names.

    Classes and normaliser are those in the file's header; else the dataset's, with the normaliser
    of timm's ``pretrained_cfg`` where the model is timm's; without a dataset, all of that is
    taken from ``pretrained_cfg`` (or torchvision's weights) and the file's own classifier.

    Args:
        spec: without a path its weights come from the cache (where ``ensure_source`` put them),
            from the python function that makes the model, or from a hub.
        sides: image sides it must accept, pixels; the run's own side first.

    Raises:
        SourceError: no weights, or weights that do not fit (the reason is named).
        DataError: the dataset is unknown.
    """
    scheme = SCHEMES[spec.scheme]
    if spec.path is None and scheme.needs_weights:
        spec = replace(spec, path=_cached(spec, sides[0]))
    weights, facts = read_weights(spec.path) if spec.path else ({}, {})
    ours = facts.get("format") == FORMAT
    if ours:
        _check_header(facts, spec)
        info = _info(facts, spec)
    else:
        info = _found_info(spec, scheme, strip_prefixes(weights))
    model = _model(spec, scheme, info, sides)
    if spec.path:
        if not weights.keys() & model.state_dict().keys():
            weights = strip_prefixes(weights)
        fit_weights(model, weights, name=spec.name, classes=len(info.classes))
    if ours and fingerprint(model) != facts["sha256"]:
        raise SourceError(f"{spec.path} was changed after it was saved", got=fingerprint(model),
                          expected=facts["sha256"], fix="make or copy the file again")  # fmt: skip
    name = spec.label if spec.data else f"{spec.name}@{info.name}"
    accuracy = facts.get("accuracy") if ours else None
    return freeze(model.to(device), info, name=name, arch=spec.arch, accuracy=accuracy)


def _model(spec: SourceSpec, scheme: Scheme, info: DatasetInfo, sides: Sequence[int]) -> nn.Module:
    """Untrained where a file is to fill it, else with weights of its own."""
    if spec.path is not None or scheme.pretrained is None:
        return scheme.build(spec.name, len(info.classes), sides)
    model = scheme.pretrained(spec.name)
    for side in sides:
        probe(model, str(spec), len(info.classes), side)
    return model


def _found_info(spec: SourceSpec, scheme: Scheme, weights: Mapping[str, Tensor]) -> DatasetInfo:
    """Classes and normaliser of weights that do not tell them."""
    # torchvision's own weights have facts; a file of another program for its model has none.
    silent = scheme.known is None or (spec.scheme == "torchvision" and spec.path is not None)
    known = None if silent or scheme.known is None else scheme.known(spec.name)
    return combine(spec.data, known, spec.arch, weights)


def _cached(spec: SourceSpec, side: int) -> Path:
    """The file that ``ensure_source`` trained for this spec at this image side."""
    from kiop_fast.pretrain import cached_source_path

    path = cached_source_path(spec, side)
    if path is None or not path.exists():
        raise no_weights(spec)
    return path


def _check_header(facts: Mapping[str, Any], spec: SourceSpec) -> None:
    if facts.get("version") != VERSION:
        raise SourceError(f"{spec.path} has another format version", got=facts.get("version"),
                          expected=VERSION, fix="use the kiop_fast that wrote it")  # fmt: skip
    if facts.get("arch") != spec.arch:
        raise SourceError(
            f"{spec.path} holds another architecture", got=facts.get("arch"), expected=spec.arch,
            fix=f"write {facts.get('arch')}@{spec.data or 'DATA'}={spec.path}",
        )  # fmt: skip


def _info(facts: Mapping[str, Any], spec: SourceSpec) -> DatasetInfo:
    try:
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts["data"].items()
        }
        info = DatasetInfo(**plain)
        facts["sha256"], facts["accuracy"]
    except (KeyError, TypeError, AttributeError, KiopError) as error:
        raise SourceError(f"the header of {spec.path} is damaged", got=repr(error),
                          expected="the facts that kiop_fast writes",
                          fix="make or copy the file again") from None  # fmt: skip
    if spec.data and spec.data != info.name:
        raise SourceError(
            f"{spec.path} was trained on other data", got=info.name, expected=spec.data,
            fix=f"write {spec.arch}@{info.name}={spec.path}",
        )  # fmt: skip
    return info


def no_weights(spec: SourceSpec) -> SourceError:
    """The error for a source that has no file and is not trained by itself."""
    data = spec.data or "DATA"
    trained = f"kiop-fast pretrain --arch {spec.name} --data {data}"
    return SourceError(
        f"source {str(spec)!r} has no weights",
        got="no path, and none in the cache",
        expected=f"{spec.label}=PATH, or data that comes with kiop_fast ({', '.join(BUILT_IN)})",
        fix=f"give the path of its weights, or train them: {trained}",
    )


def cache_folder() -> Path:
    """``KIOP_FAST_CACHE``, by default ``~/.cache/kiop_fast``."""
    return Path(os.environ.get("KIOP_FAST_CACHE") or Path.home() / ".cache" / "kiop_fast")
