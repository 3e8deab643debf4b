"""Grad-CAM of a served task, and the share of it on every ring."""

from __future__ import annotations

import pytest
import torch
from tiny_tasks import BANKS, make
from torch import Tensor, nn

from kiop_fast.deliver.gradcam import (
    class_activation,
    gradcam,
    last_feature_layer,
    region_shares,
    ring_start,
)
from kiop_fast.errors import SourceError
from kiop_fast.source import Source


class TwoFilters(nn.Module):
    """Feature map [x, 2x], mean pool, two classes: by hand, dy_c/dF_k = v[c, k] / (H·W)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
            self.classify.weight.copy_(torch.tensor([[3.0, -1.0], [1.0, -2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pool(self.features(x)).flatten(1))


class TestGradCam:
    def test_by_hand(self) -> None:
        model = TwoFilters().requires_grad_(False)
        x = torch.tensor([[1.0, -2.0], [0.5, 0.0]]).view(1, 1, 2, 2)
        layer = last_feature_layer(model, lambda: model(x))
        assert layer is model.features
        # class 0: (3·x - 1·2x)/4 = x/4; class 1: (1·x - 2·2x)/4 = -3x/4; negative parts are cut
        for label, expected in ((0, [[0.25, 0], [0.125, 0]]), (1, [[0, 1.5], [0, 0]])):
            cam = class_activation(layer, lambda: model(x), torch.tensor([label]))
            torch.testing.assert_close(cam[0], torch.tensor(expected))
        assert not model.features._forward_hooks
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("policy", ["calibrated", "running", "batch"])
    def test_of_a_served_task(self, policy: str, target: Source) -> None:
        module = make(target, policy).on(target).task("own-greys")
        with torch.no_grad():  # asked for from inside no_grad as well
            maps = gradcam(module, BANKS["own-greys"][:6])
        assert maps.shape == (6, 16, 16)
        assert not maps.requires_grad
        peaks = maps.amax((1, 2))
        assert bool(((peaks - 1).abs() < 1e-6).logical_or(peaks == 0).all())
        assert float(maps.min()) >= 0
        target.check_unchanged()

    def test_a_model_without_maps(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        with pytest.raises(SourceError, match="no feature map"):
            last_feature_layer(model, lambda: model(torch.zeros(1, 1, 2, 2)))

    def test_shares_of_the_regions(self) -> None:
        # side 8 → 11 → 16: the image starts at 2 of 11, that at 3 of 16
        assert ring_start(8, 11, (11, 16)) == 2
        assert ring_start(11, 16, (11, 16)) == 3
        assert ring_start(8, 16, (11, 16)) == 5
        even = torch.ones(2, 16, 16)
        expected = [64 / 256, (121 - 64) / 256, (256 - 121) / 256]
        assert region_shares(even, 8, (11, 16)) == pytest.approx(expected)
        assert region_shares(torch.ones(1, 11, 11), 8, (11, 16)) == pytest.approx(
            [64 / 121, 57 / 121]
        )
