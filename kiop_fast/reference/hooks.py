"""Forward hooks on BatchNorm inputs: the statistics a teacher is matched on, and its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StatisticsHook:
    """‖var - running_var‖₂ + ‖mean - running_mean‖₂ of the layer's latest input (SPEC 4, step 4).

    The variance is the biased one.  Runs on every pass, wanted or not, as upstream's does.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.loss: Tensor = torch.empty(0)
        self.layer: Any = layer
        layer.register_forward_hook(self._take)

    def _take(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        by_channel = x.transpose(0, 1).contiguous().flatten(1)
        variance = by_channel.var(1, unbiased=False)
        self.loss = torch.norm(self.layer.running_var - variance, 2) + torch.norm(
            self.layer.running_mean - mean, 2
        )


class InstanceMeanHook:
    """Spatial mean of each image in the layer's latest input, (N, C): a part of the feature."""

    def __init__(self, layer: nn.Module) -> None:
        self.means: Tensor = torch.empty(0)
        layer.register_forward_hook(self._take)

    def _take(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.means = inputs[0].mean((2, 3))
