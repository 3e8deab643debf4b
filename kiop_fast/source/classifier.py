"""Exchange the classifier of a copy of a model (mode ``vanilla``)."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import nn

from kiop_fast.errors import SourceError
from kiop_fast.source.frozen import Source


def classifier_name(model: nn.Module) -> str:
    """Name of the last Linear layer, the one that makes the logits."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise SourceError(
            f"{type(model).__name__} has no Linear layer to replace",
            expected="a model whose logits come from a Linear layer",
            fix="use another target for mode vanilla",
        )
    return names[-1]


def with_classifier(model: nn.Module, layer: nn.Linear) -> nn.Module:
    """``model`` itself with its classifier replaced by ``layer``."""
    parent, _, child = classifier_name(model).rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model


def trainable_copy(source: Source, classes: int, rng: np.random.Generator) -> nn.Module:
    """A copy of the source's model with gradients and a fresh classifier of ``classes``.

    The classifier starts as torch's default Linear, U(±1/√fan_in), from ``rng``.
    """
    model = copy.deepcopy(source.model).requires_grad_(True)
    if source.rowwise:
        model.register_forward_pre_hook(lambda _, given: tuple(x.contiguous() for x in given))
    old = model.get_submodule(classifier_name(model))
    assert isinstance(old, nn.Linear)
    layer = nn.Linear(old.in_features, classes)
    bound = 1.0 / math.sqrt(old.in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = rng.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    return with_classifier(model, layer.to(old.weight.device))


def with_original_classifier(student: nn.Module, source: Source) -> nn.Module:
    """A copy of ``student`` with the source's own classifier put back, in eval mode."""
    original = source.model.get_submodule(classifier_name(source.model))
    assert isinstance(original, nn.Linear)
    return with_classifier(copy.deepcopy(student), copy.deepcopy(original)).eval()
