"""A windowed batch gives what the whole canvas gives: logits and every gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from stand_ins import TinyNet, fill_with_waves, wave
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from kiop_fast.prompt import Prompt
from kiop_fast.prompt.windowed import Windowed, windowed
from kiop_fast.source import batch_statistics
from kiop_fast.source.zoo import build

SIDE, RINGS = 12, (15, 48)  # both differences odd


@pytest.fixture(autouse=True)
def _windows_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the window until it is nearly the whole map, far beyond where that is quick."""
    monkeypatch.setattr("kiop_fast.prompt.windowed.WHOLE", 0.95)


class Counted(nn.Module):
    """A model whose convolutions remember the largest map that they worked on, in pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.pixels = model, 0
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(self.look)

    def look(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.windowed = isinstance(inputs[0], Windowed) or self.windowed

    def forward(self, x: Tensor) -> Tensor:
        self.windowed = False
        return self.model(x)


def both_ways(
    model: nn.Module, policy: str, side: int = SIDE, rings: tuple[int, ...] = RINGS
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, image gradient and cell gradients: of windows, of the whole canvas."""
    model.eval().requires_grad_(False)
    prompt = Prompt(side, rings)
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(wave(*cells.shape, pace=0.7 + k))
    results = []
    for window in (True, False):
        images = wave(4, 3, side, side, pace=0.37).requires_grad_()
        if window:
            depth = len(rings)
            seen = windowed(prompt.border(depth), images, prompt.corner(depth))
            assert isinstance(seen, Windowed)
        else:
            seen = prompt(images)
        with batch_statistics(model) if policy == "batch" else nullcontext():
            logits = model(seen)
        assert type(logits) is Tensor
        loss = (logits * wave(*logits.shape, pace=0.9)).sum()
        results.append([logits, *torch.autograd.grad(loss, [images, *prompt.cells])])
    return results[0], results[1]


def check(model: nn.Module, policy: str, **how: object) -> None:
    ours, theirs = both_ways(model, policy, **how)  # type: ignore[arg-type]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-11 * other.abs().max()


NETS = ["resnet8", "wrn_16_1", "resnet18", "mobilenet_v2", "densenet121"]


@pytest.mark.parametrize("policy", ["batch", "running"])
@pytest.mark.parametrize("arch", NETS)
def test_a_model_of_the_zoo(arch: str, policy: str, double: None) -> None:
    model = build(arch, 10, 48, seed=0)
    fill_with_waves(model, 0.3) if arch == "resnet8" else None
    check(model.double(), policy)


def test_the_window_is_used(double: None) -> None:
    counted = Counted(build("resnet18", 10, 48, seed=0).double())
    check(counted, "batch")
    prompt = Prompt(SIDE, RINGS)
    counted(windowed(prompt.border(2), wave(4, 3, SIDE, SIDE), prompt.corner(2)))
    assert counted.windowed


class Odd(nn.Module):
    """Layers with unusual settings, and operations that know nothing of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(2, 1), dilation=(2, 1))
        self.b = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.c = nn.Conv2d(4, 6, 1, stride=2)
        self.d = nn.Conv2d(4, 6, 4, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        assert x.size(1) == x.shape[1]
        x = F.silu(self.a(x))
        x = x + 1.0 - 0.5 * x
        y = self.c(x) + F.interpolate(self.d(x), size=self.c(x).shape[2:])
        y = self.pool(torch.cat([y, self.c(self.b(x))], 1))
        return y.flatten(1).mean(1, keepdim=True) * y.amax((2, 3))


def test_unusual_layers(double: None) -> None:
    model = Odd()
    fill_with_waves(model)
    check(model, "running")


def test_in_place_layers_and_additions(double: None) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
            self.b = nn.Conv2d(5, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.n(self.a(x)), inplace=True)
            y = self.b(x)
            y += x
            return F.relu_(y).mean((2, 3))

    model = InPlace()
    fill_with_waves(model)
    for policy in ("batch", "running"):
        check(model, policy)


def test_a_window_at_the_edge_becomes_whole(double: None) -> None:
    model = TinyNet(5)
    fill_with_waves(model)
    check(model, "batch", side=12, rings=(13, 16))


def test_every_torchvision_family_that_runs_at_this_size(double: None) -> None:
    for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet"):
        options = {"init_weights": False} if name == "googlenet" else {}
        torch.manual_seed(0)
        model = models.get_model(name, num_classes=4, **options)
        check(model, "running", side=16, rings=(64,))
