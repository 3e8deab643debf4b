"""Architectures by name: small CIFAR-style nets and torchvision's classifiers, untrained."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.errors import SourceError, unknown_name
from kiop_fast.runtime import draws
from kiop_fast.source.small_nets import SMALL_NETS

# Settings without which a torchvision model is no plain classifier or warns while it is built.
_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@lru_cache(maxsize=1)
def torchvision_names() -> tuple[str, ...]:
    """torchvision's classifiers."""
    from torchvision import models

    return tuple(models.list_models(module=models))


def names() -> list[str]:
    """Every architecture; which of them accept an image side, :func:`build` finds out."""
    return sorted({*SMALL_NETS, *torchvision_names()})


def check_name(arch: str) -> None:
    """Raise SourceError, with the close matches, unless ``arch`` is in the zoo."""
    if arch not in SMALL_NETS and arch not in torchvision_names():
        raise unknown_name("architecture", arch, names(), SourceError)


def build(arch: str, classes: int, sides: int | Iterable[int], *, seed: int = 0) -> nn.Module:
    """An untrained classifier, (N, 3, s, s) → (N, classes); nothing is downloaded.

    Args:
        arch: a name from :func:`names`.
        classes: outputs of the classifier head.
        sides: image sides, pixels, that the model must accept: the run's and, for A, its rings'.
        seed: of the initial weights; the global random state is neither read nor changed.

    Raises:
        SourceError: the name is unknown, or the model does not accept one of the sides.
    """
    check_name(arch)
    sides = [sides] if isinstance(sides, int) else list(sides)
    outline = _outline(arch, classes)
    if outline is not None:
        for side in sides:
            probe(outline, arch, classes, side)
    rng = draws.generator(seed, 0, arch, "initial weights")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        model = _make(arch, classes)
    if outline is None:
        for side in sides:
            probe(model, arch, classes, side)
    return model


def _outline(arch: str, classes: int) -> nn.Module | None:
    """The model without memory for its weights, to probe quickly; None where that cannot be."""
    try:
        with torch.device("meta"):
            return _make(arch, classes)
    except (NotImplementedError, RuntimeError):  # regnet computes its widths with tensors
        return None


def _make(arch: str, classes: int) -> nn.Module:
    if arch in SMALL_NETS:
        return SMALL_NETS[arch](classes)
    from torchvision import models

    settings = _SETTINGS.get(arch, {})
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **settings)
    return model


def probe(model: nn.Module, name: str, classes: int, side: int) -> None:
    """Call ``model`` once on two blank images, in eval mode, where its weights are.

    Raises:
        SourceError: it fails, or its output is not (2, classes).
    """
    weight = next(model.parameters(), None)
    images = torch.zeros(2, 3, side, side, device=None if weight is None else weight.device)
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except Exception as error:
        raise SourceError(
            f"{name} does not accept images of {side} pixels",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}",
            expected=f"(2, 3, {side}, {side}) → (2, {classes})",
            fix="choose a larger side (or rings) or another architecture, e.g. resnet18",
        ) from None
    finally:
        model.train(was_training)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != (2, classes):
        raise SourceError(
            f"{name} is no classifier of {classes} classes",
            got=f"output {shape} for two images of {side} pixels",
            expected=f"logits of shape (2, {classes})",
            fix="use a model whose output has one number a class",
        )
