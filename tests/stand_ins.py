"""Small frozen models and data facts that several tests share; no test lives here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.source import Source, freeze


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, a pool and a classifier; any image side."""

    def __init__(self, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 9, 3, padding=1, bias=False),
            nn.BatchNorm2d(9),
            nn.ReLU(inplace=True),
        )
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classify = nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.drop(self.body(x).mean((2, 3))))


def wave(*shape: int, pace: float = 1.0, lift: float = 0.0) -> Tensor:
    """lift + sin(pace · i) for i = 1, 2, …, in the default dtype: numbers no RNG has a part in."""
    count = torch.Size(shape).numel()
    return (
        (lift + torch.sin(pace * torch.arange(1, count + 1).double()))
        .view(shape)
        .to(torch.get_default_dtype())
    )


@torch.no_grad()
def fill_with_waves(module: nn.Module, size: float = 0.5) -> None:
    """Parameter or buffer k of ``module`` becomes size · sin((0.3 + 0.1 k) i); variances > 0."""
    for k, (name, value) in enumerate(module.state_dict().items()):
        if value.is_floating_point():
            lift = 1.5 if name.endswith("running_var") else 0.0
            value.copy_(size * wave(*value.shape, pace=0.3 + 0.1 * k, lift=lift))


def tiny_source(
    name: str, classes: int, seed: int, dropout: float = 0.0, **facts: object
) -> Source:
    """A frozen TinyNet with seeded weights and running statistics, in the default dtype."""
    make = torch.Generator().manual_seed(seed)
    model = TinyNet(classes, dropout)
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
