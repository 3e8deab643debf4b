"""Small frozen models and data facts that several tests share; no test lives here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.source import Source, freeze


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, a pool and a classifier; any image side."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 9, 3, padding=1, bias=False),
            nn.BatchNorm2d(9),
            nn.ReLU(inplace=True),
        )
        self.classify = nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(x).mean((2, 3)))


def tiny_source(name: str, classes: int, seed: int, **facts: object) -> Source:
    """A frozen TinyNet with seeded weights and running statistics, in the default dtype."""
    make = torch.Generator().manual_seed(seed)
    model = TinyNet(classes)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=make)
            value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else 0.4 * noise)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.add_(1.0)
        model.classify.weight.mul_(4.0)
    labels = tuple(f"{name}{k}" for k in range(classes))
    values: dict[str, object] = {"side": 8, "channels": 3, **facts}
    return freeze(model, DatasetInfo(name, classes=labels, **values), name=name, arch="tiny")  # type: ignore[arg-type]
