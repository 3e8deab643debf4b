"""Models that other libraries build and keep weights of: timm, torchvision, the Hugging Face hub.

Nothing is downloaded but weights that a source names without a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kiop_fast.errors import SourceError, unknown_name
from kiop_fast.runtime import draws
from kiop_fast.source import zoo
from kiop_fast.source.known import Known, numbered

_HUB = "hf-hub:"


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise SourceError("timm is not installed", got=error, expected="the package timm",
                          fix="pip install timm") from None  # fmt: skip
    return timm


# --- timm --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _timm_names() -> frozenset[str]:
    timm = _timm()
    return frozenset([*timm.list_models(), *timm.list_pretrained()])


def check_timm(name: str) -> None:
    """Raise SourceError, with the close matches, unless timm knows ``name``."""
    if name not in _timm_names():
        raise unknown_name("timm model", name, _timm_names(), SourceError)


def build_timm(name: str, classes: int, *, seed: int = 0) -> nn.Module:
    """Untrained, with ``classes`` outputs; the global random state is neither read nor changed."""
    rng = draws.generator(seed, 0, f"timm:{name}", "initial weights")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        model: nn.Module = _timm().create_model(name, pretrained=False, num_classes=classes)
    return model


def known_timm(name: str) -> Known:
    """From timm's ``pretrained_cfg``."""
    return _known(_timm().get_pretrained_cfg(name, allow_unregistered=False).to_dict(), name)


def _known(facts: dict[str, Any], name: str) -> Known:
    try:
        size = facts.get("input_size") or (3, 224, 224)
        if size[0] != 3 or size[1] != size[2]:
            raise ValueError(f"input size {size}")
        names = facts.get("label_names")
        names = list(names.values()) if isinstance(names, dict) else names
        classes = tuple(names) if names else numbered(int(facts["num_classes"]))
        mean, std = (tuple(float(v) for v in facts[key]) for key in ("mean", "std"))
        layer = facts.get("classifier") or ""
        layer = layer if isinstance(layer, str) else layer[0]
        return Known(classes, mean, std, int(size[1]), layer)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"timm's facts about {name} cannot be used", got=repr(error),
                          expected="three channels, square images, mean, std, num_classes",
                          fix="name weights and dataset: NAME@DATA=PATH") from None  # fmt: skip


def pretrained_timm(name: str) -> nn.Module:
    """With the weights timm points to."""
    return _fetched(f"timm:{name}", lambda: _timm().create_model(name, pretrained=True))


# --- the Hugging Face hub ------------------------------------------------------------------------


def check_hub(name: str) -> None:
    """Raise SourceError unless ``name`` reads like OWNER/REPO or is a folder."""
    if not Path(name).is_dir() and name.count("/") != 1:
        raise SourceError("a hub source names a repository", got=f"{_HUB}{name}",
                          expected="hf-hub:OWNER/REPO, or a folder with a config.json as timm "
                          "saves it", fix="check the name")  # fmt: skip


def _hub_name(name: str) -> str:
    """As timm wants it; a folder that was fetched before needs no network."""
    return f"local-dir:{name}" if Path(name).is_dir() else f"{_HUB}{name}"


def pretrained_hub(name: str) -> nn.Module:
    """The model of a repository with its weights."""
    return _fetched(_HUB + name, lambda: _timm().create_model(_hub_name(name), pretrained=True))


def known_hub(name: str) -> Known:
    """From the repository's ``config.json``."""

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = _timm().create_model(_hub_name(name), pretrained=False)
        return model

    model = _fetched(_HUB + name, build)
    return _known({**model.pretrained_cfg, "num_classes": model.num_classes}, name)  # type: ignore[dict-item]


def build_hub(name: str, classes: int) -> nn.Module:
    """Untrained, with ``classes`` outputs."""
    return _fetched(
        _HUB + name,
        lambda: _timm().create_model(_hub_name(name), pretrained=False, num_classes=classes),
    )


# --- torchvision ---------------------------------------------------------------------------------


def check_torchvision(name: str) -> None:
    """Raise SourceError, with the close matches, unless torchvision classifies with ``name``."""
    names = zoo.torchvision_names()
    if name not in names:
        raise unknown_name("torchvision model", name, names, SourceError)


def known_torchvision(name: str) -> Known:
    """From the documentation that torchvision ships with its default weights."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    shown = weights.transforms()
    classes = tuple(weights.meta["categories"])
    return Known(classes, tuple(shown.mean), tuple(shown.std), shown.crop_size[0])


def pretrained_torchvision(name: str) -> nn.Module:
    """With torchvision's default weights."""
    from torchvision import models

    return _fetched(f"torchvision:{name}", lambda: models.get_model(name, weights="DEFAULT"))


def _fetched(source: str, make: Callable[[], nn.Module]) -> nn.Module:
    """``make()``, its failures (no network, no repository, a broken download) as one message."""
    try:
        return make()
    except SourceError:
        raise
    except Exception as error:  # each hub has errors of its own, down to those of its transport
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"the weights of {source} cannot be fetched",
            got=f"{type(error).__name__}: {lines[0][:200]}",
            expected="a network, or weights that were fetched before",
            fix=f"give a file: {source}@DATA=PATH, or fetch them where there is a network",
        ) from None
