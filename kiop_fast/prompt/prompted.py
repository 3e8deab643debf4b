"""A frozen model seen through a prompt (the paper's SMA and SMB)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kiop_fast.errors import MappingError
from kiop_fast.prompt.rings import Prompt
from kiop_fast.prompt.windowed import pays, windowed
from kiop_fast.runtime.execution import PLAIN
from kiop_fast.source import DropoutDraws, Source, batch_statistics, normalising_layers


class PromptedModel:
    """A's logits for one task: normalised images → rings → A → mapped classes.

    ``depth=1`` without a mapping is SMA; ``depth=i+1`` with provider i's mapping is SMB_i.  It
    holds references, owns no parameters and never writes to the model.

    Args:
        target: model A.
        prompt: shared by all tasks of a run.
        depth: how many rings the images pass.
        mapping: (classes of the provider,) int64; None keeps A's own classes.
        batchnorm: ``running`` uses A's own statistics, ``batch`` and ``calibrated``, which
            trains as it, each batch's.
        dropout: masks for A's dropout layers, which then stay on (upstream); None: off.
    """

    def __init__(
        self,
        target: Source,
        prompt: Prompt,
        depth: int,
        mapping: Tensor | None = None,
        *,
        batchnorm: str = "batch",
        dropout: DropoutDraws | None = None,
    ) -> None:
        self.target, self.prompt, self.depth = target, prompt, depth
        self.mapping, self.batchnorm, self.dropout = mapping, batchnorm, dropout
        if mapping is not None and (int(mapping.min()) < 0 or int(mapping.max()) >= target.classes):
            raise MappingError(
                "the mapping names classes that the target does not have",
                got=f"entries {int(mapping.min())} … {int(mapping.max())}",
                expected=f"0 … {target.classes - 1}",
            )

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) normalised → A's unmapped logits (N, classes of A)."""
        return self._logits(self.worn(images), "prompted")

    def worn(self, images: Tensor) -> Tensor:
        """As :meth:`seen`; where the canvas is much larger than the image, windowed."""
        if not pays(images, self.prompt.canvas_side(self.depth)):
            return self.seen(images)
        return windowed(self.prompt.border(self.depth), images, self.prompt.corner(self.depth))

    def seen(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) → the canvas that A sees, (N, 3, S_depth, S_depth)."""
        return self.prompt(images, self.depth)

    def plain_logits(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) normalised → A's logits without the prompt, under the same policy."""
        return self._logits(images, "plain")

    def _logits(self, images: Tensor, role: str) -> Tensor:
        model = self.target.model
        with nullcontext() if self.dropout is None else self.dropout.active(model, role):
            return frozen_logits(self.target, images, self.batchnorm)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) normalised → logits of the task's classes."""
        logits = self.logits(images)
        return logits if self.mapping is None else logits[:, self.mapping]


def frozen_logits(target: Source, images: Tensor, batchnorm: str) -> Tensor:
    """A's logits (N, classes) under a BatchNorm policy, as while training."""
    if batchnorm == "running":
        return target.logits(images)
    with batch_statistics(target.model):
        return target.logits(images)


@torch.no_grad()
def calibrate(prompted: PromptedModel, images: Tensor, batch: int) -> dict[str, Tensor]:
    """BatchNorm statistics of A on images seen through the prompt (policy ``calibrated``).

    One pass in fp32, in chunks of at most ``batch`` images, near equal in size; inside a chunk
    layers normalise with the chunk's own statistics.  Means and variances are pooled exactly over
    all images (within plus between chunks) in fp64 and stored in fp32.

    Args:
        images: (M, 3, s, s) normalised, the task's whole synthetic bank, no augmentation.

    Returns:
        ``{layer}.running_mean`` and ``{layer}.running_var`` (biased) by buffer name.
    """
    layers = normalising_layers(prompted.target.model)
    sums = {name: torch.zeros(3, layer.num_features, dtype=torch.float64, device=images.device)
            for name, layer in layers.items()}  # fmt: skip
    centres: dict[str, Tensor] = {}

    def tap(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double()
            over = (0, *range(2, x.ndim))
            centre = centres.setdefault(name, x.mean(over))
            shifted = x - centre.view(-1, *[1] * (x.ndim - 2))
            count = torch.full_like(centre, x.numel() / x.shape[1])
            sums[name] += torch.stack([count, shifted.sum(over), (shifted**2).sum(over)])

        return hook

    hooks = [layer.register_forward_pre_hook(tap(name)) for name, layer in layers.items()]
    try:
        with PLAIN.products(images.device):
            for part in images.chunk(-(-len(images) // batch)):
                frozen_logits(prompted.target, prompted.seen(part), "batch")
    finally:
        for hook in hooks:
            hook.remove()
    statistics: dict[str, Tensor] = {}
    for name, (count, first, second) in sums.items():
        if name not in centres:  # no part of a forward pass: a head that only training needs
            own = {f"{name}.{key}": value.float() for key, value in layers[name].named_buffers()}
            statistics |= {key: own[key] for key in own if "running_" in key}
            continue
        shift = first / count
        statistics[f"{name}.running_mean"] = (centres[name] + shift).float()
        statistics[f"{name}.running_var"] = (second / count - shift**2).clamp(min=0).float()
    return statistics
