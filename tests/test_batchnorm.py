"""Taps on BatchNorm layers, of models from anywhere, change no output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kiop_fast.source import (
    BatchNormTaps,
    build,
)
from kiop_fast.source.hubs import build_timm

pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:test_resnet", "mobilenet_v2"])
def test_taps_change_no_output(name: str) -> None:
    """timm's BatchNormAct2d applies its activation after normalising; a tap has to as well."""
    scheme, _, arch = name.rpartition(":")
    model = build_timm(arch, 10) if scheme else build(arch, 10, 32)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 1.5)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].mean((2, 3))))
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    with BatchNormTaps(model) as taps:
        assert torch.allclose(model(images), expected, atol=1e-5)
        features = taps.take()[1]
    assert torch.allclose(features, torch.cat(seen, dim=1), atol=1e-5)


class Unknown(nn.BatchNorm2d):
    """A BatchNorm whose forward nobody here has seen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x) + 1


def test_taps_leave_an_unknown_forward_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Unknown(4), nn.Flatten()).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    with BatchNormTaps(model):
        assert torch.allclose(model(images), expected, atol=1e-6)
