"""The image generator, made anew for every call of the synthesize period."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiop_fast.runtime import draws


class UpsampledConv(nn.Conv2d):
    """Nearest ×2, then a 3 × 3 convolution, as one transposed convolution of stride 2.

    Doubled pixels let kernel entries that fall on the same input be added beforehand: with w'
    the flipped kernel, ``w4[j] = w'[j] + w'[j - 1]`` along both axes, four products an output
    pixel instead of nine.  Forward + backward, fp32, one core, batch 64: 128 → 128 channels at
    16² 341 → 135 ms, 128 → 64 at 32² 829 → 205 ms (channels-last 221 → 120, 313 → 161 ms).
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
        return F.conv_transpose2d(x, kernel, stride=2, padding=1)


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
        self.seed_side, self.channels = side // 4, channels
        self.project = nn.Linear(latent, 2 * width * self.seed_side**2)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Identity(),  # holds the place of upstream's nn.Upsample: parameters keep their names
            UpsampledConv(2 * width, 2 * width),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Identity(),
            UpsampledConv(2 * width, width),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        seed = self.project(z).view(len(z), -1, self.seed_side, self.seed_side)
        images: Tensor = self.blocks(seed.contiguous(memory_format=torch.channels_last))
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
