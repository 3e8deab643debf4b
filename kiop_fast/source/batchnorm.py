"""BatchNorm layers of a frozen model: find them, tap their inputs, give them other statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.errors import SourceError
from kiop_fast.kernels import BnMatch, bn_match


def batchnorm_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """BatchNorm2d layers with running statistics, by name, in module order.

    Raises:
        SourceError: there is none; contrastive model inversion needs them.
    """
    found = normalising_layers(model)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.BatchNorm2d)}
    if not layers:
        raise SourceError(
            f"{type(model).__name__} has no BatchNorm2d layer with running statistics",
            expected="a model with BatchNorm: the synthesis matches its running mean and variance "
            "and takes its contrastive features at these layers",
            fix="choose an architecture with BatchNorm, e.g. resnet18 or vgg13_bn",
        )
    return layers


def normalising_layers(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers of every kind that keep running statistics, by name, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def check_each_runs_once(model: nn.Module, side: int) -> None:
    """Features and matching loss take each BatchNorm2d layer once a forward pass.

    Raises:
        SourceError: a layer takes no part in a pass over images of ``side`` pixels, or several.
    """
    layers = batchnorm_layers(model)
    calls = dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    hooks = [layer.register_forward_pre_hook(count(name)) for name, layer in layers.items()]
    try:
        model(next(model.parameters()).new_zeros(1, 3, side, side))
    finally:
        for hook in hooks:
            hook.remove()
    wrong = {name: number for name, number in calls.items() if number != 1}
    if wrong:
        name, number = next(iter(wrong.items()))
        raise SourceError(
            f"{type(model).__name__} does not pass each of its BatchNorm layers once",
            got=f"{len(wrong)} of {len(calls)} otherwise, e.g. {name!r} {number} times",
            expected="every layer once, in eval mode",
            fix="remove heads that only training needs (aux_logits=False), or give a layer that "
            "is shared a copy of its own at each place",
        )


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises with its batch's own statistics and writes no buffer."""
    layers = _normalising(model)
    before = [(m.training, m.track_running_stats) for m in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer, (training, track) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, track


def with_statistics(model: nn.Module, statistics: Mapping[str, Tensor] | None) -> nn.Module:
    """The same network on other BatchNorm statistics, to be used beside ``model``, at once.

    Modules of its own, and ``model``'s own parameters and buffers in them, but for the statistics.

    Args:
        statistics: ``{layer}.running_mean`` and ``{layer}.running_var`` of every layer; None:
            it normalises with the statistics of each batch, also in eval mode, and keeps none.

    Raises:
        SourceError: something in the model cannot be copied.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        beside = copy.deepcopy(model, shared)
    except Exception as error:
        raise SourceError(
            f"{type(model).__name__} cannot be copied, as its BatchNorm layers must be",
            got=f"{type(error).__name__}: {error}",
            expected="a model that copy.deepcopy takes",
            fix="keep locks, open files and the like out of the model",
        ) from error
    beside.eval()
    for name, value in (statistics or {}).items():
        layer, _, part = name.rpartition(".")
        setattr(beside.get_submodule(layer), part, value.to(beside.get_buffer(name), copy=True))
    if statistics is None:
        for module in _normalising(beside):
            module.training, module.track_running_stats = True, False
    return beside


def _normalising(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class BatchNormTaps:
    """Replace the forward of a frozen model's BatchNorm layers by the tapped ``bn_match``.

    Inside the context every forward pass of the model leaves, per layer and in call order, the
    matching loss over the first ``rows`` images and the per-image means of the layer's input.

    Args:
        model: frozen, in eval mode.
        rows: leading images of a batch that enter the matching loss; None for all.
    """

    def __init__(self, model: nn.Module, rows: int | None = None) -> None:
        self.layers = list(batchnorm_layers(model).values())
        self.rows = rows
        self._taken: list[BnMatch] = []

    def __enter__(self) -> BatchNormTaps:
        for layer in self.layers:
            layer.forward = self._tapped(layer)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        for layer in self.layers:
            del layer.forward
        self._taken.clear()

    def _tapped(self, layer: nn.BatchNorm2d):  # type: ignore[no-untyped-def]
        rest = _rest(layer)

        def forward(x: Tensor) -> Tensor:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            match = bn_match(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps,
                rows=self.rows,
            )  # fmt: skip
            self._taken.append(match)
            return match.output if rest is None else rest(match.output, x)

        return forward

    def take(self) -> tuple[Tensor, Tensor]:
        """Matching loss summed over the layers (0-d) and features (N, F), then start anew."""
        loss = torch.stack([match.loss for match in self._taken]).sum()
        features = torch.cat([match.image_means for match in self._taken], dim=1)
        self._taken.clear()
        return loss, features


def _rest(layer: nn.BatchNorm2d) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What a layer does besides normalising: (normalised, input) → output; None: nothing."""
    if type(layer).forward is nn.BatchNorm2d.forward:
        return None
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    if type(layer).__name__ == "BatchNormAct2d" and callable(drop) and callable(act):  # timm's
        return lambda normalised, x: act(drop(normalised))
    whole = type(layer).forward  # a forward of its own, which normalises once more
    return lambda normalised, x: whole(layer, x)
