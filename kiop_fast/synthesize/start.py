"""What the generator of a call starts from: fresh weights, or what earlier calls learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kiop_fast.synthesize.period import SynthesisDraws


class MetaStart:
    """A start that the calls of a task share and improve (``synthesis.start = "meta"``).

    After every call ``w ← w + rate · (learned − w)``, Reptile's step (Nichol et al. 2018); the
    next call begins at ``w`` with a latent and targets of its own and needs fewer steps.  Data-free
    distillation begins so in FastDFKD (Fang et al., AAAI 2022).  The paper of KiOP makes every
    generator anew: this is an approximation, and named in a run's settings.

    Args:
        rate: 1 starts where the last call ended.

    Attributes:
        weights: by the generator's parameter names; empty before the first call.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.weights: dict[str, Tensor] = {}

    def begin(self, drawn: SynthesisDraws) -> SynthesisDraws:
        """The call's draws, its weights in place of drawn ones once there are some."""
        return replace(drawn, weights=self.weights) if self.weights else drawn

    @torch.no_grad()
    def end(self, drawn: SynthesisDraws, generator: nn.Module) -> None:
        """Learn from a finished call, which began with the weights of ``drawn``."""
        self.weights = {
            name: torch.lerp(drawn.weights[name].to(learned), learned, self.rate).contiguous()
            for name, learned in generator.named_parameters()
        }

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """``{prefix}.{name}`` → tensor, for a checkpoint."""
        return {f"{prefix}.{name}": value for name, value in self.weights.items()}

    def load(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Give back what :meth:`tensors` took."""
        start = len(prefix) + 1
        self.weights = {
            name[start:]: value for name, value in tensors.items() if name.startswith(prefix + ".")
        }
