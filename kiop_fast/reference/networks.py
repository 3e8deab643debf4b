"""The generator and the projection head, as upstream builds them.

Parameter names are those of the fast rooms' modules, so that both take the same drawn weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """z (N, latent) → images (N, channels, side, side) in [0, 1] (SPEC section 4, step 2)."""

    def __init__(self, latent: int, width: int, side: int, channels: int) -> None:
        super().__init__()
        self.seed_side = side // 4
        self.project = nn.Linear(latent, 2 * width * self.seed_side**2)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        seed = self.project(z).view(len(z), -1, self.seed_side, self.seed_side)
        images: Tensor = self.blocks(seed)
        return images


class Head(nn.Module):
    """The paper's discriminator 𝒟: features → (N, dim) of unit length; ``hidden`` 0: as wide."""

    def __init__(self, features: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden or features)
        self.second = nn.Linear(hidden or features, dim)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.relu(self.first(features), inplace=True)
        return F.normalize(self.second(hidden), dim=1)
