"""Who can build a source model; one entry a scheme, so that another family is one more entry."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kiop_fast.errors import SourceError
from kiop_fast.source import hubs, zoo
from kiop_fast.source.known import Known


@dataclass(frozen=True)
class Scheme:
    """A family of models.

    Attributes:
        check: raise SourceError if the name cannot be one of this family; quick.
        build: (name, classes, sides) → model that maps (N, 3, s, s) to (N, classes).
        needs_weights: what ``build`` returns is untrained, so a file must be given or cached.
        known: facts that come with the model's own weights and architecture.
        pretrained: the model with weights of its own, which may be downloaded for it.
    """

    check: Callable[[str], None]
    build: Callable[[str, int, Sequence[int]], nn.Module]
    needs_weights: bool = False
    known: Callable[[str], Known] | None = None
    pretrained: Callable[[str], nn.Module] | None = None


def _check_python(name: str) -> None:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise SourceError(
            "a python source names a module and a function",
            got=f"python:{name}",
            expected="python:mymodule:build@DATA",
            fix="write the module's import name, a colon, and the function that makes the model",
        )


def _build_python(name: str, classes: int, sides: Sequence[int]) -> nn.Module:
    """Call ``module:function``, with the number of classes if it takes an argument."""
    _check_python(name)
    function = _find(name)
    try:
        model = function(classes) if _takes_an_argument(function) else function()
    except Exception as error:
        raise SourceError(f"python:{name} failed while building the model",
                          got=f"{type(error).__name__}: {error}",
                          fix="mend that function") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise SourceError(f"python:{name} made no model", got=type(model).__name__,
                          expected="a torch.nn.Module", fix="return the model")  # fmt: skip
    for side in sides:
        zoo.probe(model, f"python:{name}", classes, side)
    return model


def _find(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    try:
        with _working_folder_importable():
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise SourceError(
            f"module {module_name!r} cannot be imported",
            got=error,
            expected="a module in the working folder or installed",
            fix="check the name, or run where the module lies",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SourceError(f"module {module_name!r} has no function {function_name!r}",
                          got=sorted(n for n in vars(module) if not n.startswith("_"))[:20],
                          expected=function_name, fix="check the name")  # fmt: skip
    return function


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """An installed command has no working folder on its path; ``python -m`` has."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _takes_an_argument(function: Callable[..., Any]) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind in positional for p in parameters)


def _probed(build: Callable[[str, int], nn.Module], label: str) -> Callable[..., nn.Module]:
    """``build`` with a look whether the model takes the sides."""

    def made(name: str, classes: int, sides: Sequence[int]) -> nn.Module:
        model = build(name, classes)
        for side in sides:
            zoo.probe(model, f"{label}:{name}", classes, side)
        return model

    return made


SCHEMES: dict[str, Scheme] = {
    "zoo": Scheme(zoo.check_name, zoo.build, needs_weights=True),
    "python": Scheme(_check_python, _build_python),
    "torchvision": Scheme(
        hubs.check_torchvision,
        zoo.build,
        known=hubs.known_torchvision,
        pretrained=hubs.pretrained_torchvision,
    ),
    "timm": Scheme(
        hubs.check_timm,
        _probed(hubs.build_timm, "timm"),
        known=hubs.known_timm,
        pretrained=hubs.pretrained_timm,
    ),
    "hf-hub": Scheme(
        hubs.check_hub,
        _probed(hubs.build_hub, "hf-hub"),
        known=hubs.known_hub,
        pretrained=hubs.pretrained_hub,
    ),
}


def build_untrained(arch: str, classes: int, side: int, *, seed: int) -> nn.Module:
    """An untrained model of the zoo, or ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        SourceError: unknown, or it does not take the side.
    """
    scheme, colon, name = arch.partition(":")
    if not colon or scheme == "torchvision":
        return zoo.build(name or arch, classes, side, seed=seed)
    if scheme != "timm":
        raise SourceError("only architectures by name can be trained here", got=arch,
                          expected="NAME, torchvision:NAME or timm:NAME",
                          fix="train it yourself and give its weights")  # fmt: skip
    hubs.check_timm(name)
    model = hubs.build_timm(name, classes, seed=seed)
    zoo.probe(model, arch, classes, side)
    return model
