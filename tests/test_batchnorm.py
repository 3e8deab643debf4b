"""BatchNorm layers of models from anywhere: taps change no output; other statistics beside."""

from __future__ import annotations

from threading import Lock

import pytest
import torch
from stand_ins import wave
from torch import nn

from kiop_fast.errors import SourceError
from kiop_fast.source import BatchNormTaps, build
from kiop_fast.source.batchnorm import with_statistics
from kiop_fast.source.hubs import build_timm


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:test_resnet", "mobilenet_v2"])
def test_taps_change_no_output(name: str) -> None:
    """timm's BatchNormAct2d applies its activation after normalising; a tap has to as well."""
    scheme, _, arch = name.rpartition(":")
    if scheme:
        pytest.importorskip("timm")
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


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return model


def test_other_statistics_beside_the_model() -> None:
    model, mean, var = small(), torch.arange(4.0), torch.arange(1.0, 5)
    images, own = wave(5, 3, 8, 8), model(wave(5, 3, 8, 8))
    beside = with_statistics(model, {"1.running_mean": mean, "1.running_var": var})
    each = with_statistics(model, None)
    x, layer = model[0](images), model[1]
    for found, centre, spread in (
        (beside(images), mean, var),
        (each(images), x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)),
    ):
        scale = layer.weight / (spread + layer.eps).sqrt()
        expected = (x - centre.view(-1, 1, 1)) * scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        torch.testing.assert_close(found, expected.flatten(1))
    assert torch.equal(model(images), own)
    assert torch.equal(each[1].running_mean, torch.zeros(4))
    assert beside[0].weight is each[0].weight is model[0].weight


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = small()
    model.lock = Lock()
    with pytest.raises(SourceError, match=r"(?s)Sequential cannot be copied.*lock"):
        with_statistics(model, None)
