"""The image generator, made anew for every call of the synthesize period."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kiop_fast.runtime import draws


class Generator(nn.Module):
    """z (N, latent) → images (N, channels, side, side) in [0, 1] (SPEC section 4, step 2).

    Linear → BN → nearest ×2 → conv, BN, LeakyReLU(0.2) → nearest ×2 → conv, BN, LeakyReLU →
    conv → sigmoid; upstream ``datafree/models/generator.py``.

    Args:
        latent: width of z.
        width: channels before the last convolution (upstream's ngf).
        side: image side, a multiple of 4.
        channels: 3, or 1 for grey data.
    """

    def __init__(self, latent: int, width: int, side: int, channels: int) -> None:
        super().__init__()
        self.seed_side = side // 4
        self.project = nn.Linear(latent, 2 * width * self.seed_side**2)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        seed = self.project(z).view(len(z), -1, self.seed_side, self.seed_side)
        images: Tensor = self.blocks(seed)
        return images


def generator_weights(rng: np.random.Generator, generator: Generator) -> dict[str, Tensor]:
    """Fresh weights: Conv, Linear ~ N(0, 0.02); BatchNorm weight ~ N(1, 0.02); biases 0."""
    weights = {}
    for name, parameter in generator.named_parameters():
        if name.endswith("bias"):
            weights[name] = torch.zeros(parameter.shape)
        else:
            mean = 1.0 if parameter.ndim == 1 else 0.0
            weights[name] = draws.normal(rng, *parameter.shape, std=0.02, mean=mean)
    return weights


@torch.no_grad()
def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy drawn ``weights`` into the parameters of ``module``, in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])
