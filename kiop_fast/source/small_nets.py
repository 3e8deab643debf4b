"""Small CIFAR-style classifiers: ResNet (He et al. 2016) and WideResNet (Zagoruyko 2016).

Three stages at full, half and quarter resolution and a global average pool, so any canvas of at
least 4 pixels works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


def _conv3(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus shortcut (1x1 conv and bn where the shape changes), then relu."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(inside, outside, stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = _conv3(outside, outside), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += self.shortcut(x)
        return F.relu(h, inplace=True)


class SmallResNet(nn.Module):
    """ResNet of depth 6·blocks + 2 with 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv, self.bn = _conv3(3, 16), nn.BatchNorm2d(16)
        layers: list[nn.Module] = []
        inside = 16
        for stage in range(3):
            for block in range(blocks):
                outside = 16 << stage
                layers.append(ResidualBlock(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(inside, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x)), inplace=True))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    """Pre-activation block; a change of width takes its 1x1 shortcut after the first bn-relu."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), _conv3(inside, outside, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outside), _conv3(outside, outside)
        self.shortcut: nn.Conv2d | None = None
        if inside != outside or stride != 1:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x), inplace=True)
        straight: Tensor = x if self.shortcut is None else self.shortcut(h)
        h = F.relu(self.bn2(self.conv1(h)), inplace=True)
        return straight + self.conv2(h)


class WideResNet(nn.Module):
    """WRN-depth-width: 16·width, 32·width and 64·width channels, (depth - 4) / 6 blocks each."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv = _conv3(3, 16)
        layers: list[nn.Module] = []
        inside = 16
        for stage in range(3):
            for block in range((depth - 4) // 6):
                outside = (16 << stage) * width
                layers.append(WideBlock(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inside)
        self.fc = nn.Linear(inside, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(x))), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions, zero bias of the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


SMALL_NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(SmallResNet, 1),
    "resnet20": partial(SmallResNet, 3),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
}
