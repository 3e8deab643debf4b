"""Grad-CAM of a frozen model seen through its prompt (the paper's Figure 3).

For the activations F (N, K, H, W) of the last feature map before pooling and the logit y of a
class: w_k = mean over the map of dy/dF_k, cam = ReLU(Σ_k w_k F_k).  Gradients are taken with
respect to F alone: the graph starts at the hook, the model stays frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kiop_fast.errors import SourceError
from kiop_fast.prompt.served import PromptedTask

_NO_FEATURES = (
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d,
)  # fmt: skip


@torch.no_grad()
def last_feature_layer(model: nn.Module, run: Callable[[], object]) -> nn.Module:
    """The module that makes the last map (N, K, H, W) with more than one place before pooling.

    Args:
        model: to look into.
        run: a forward pass of it.

    Raises:
        SourceError: there is no such map.
    """
    finished: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        is_map = isinstance(output, Tensor) and output.ndim == 4
        if is_map and output.shape[2] * output.shape[3] > 1 and module is not model:
            finished.append(module)

    layers = [m for m in model.modules() if not isinstance(m, _NO_FEATURES)]
    hooks = [module.register_forward_hook(note) for module in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not finished:
        raise SourceError(
            f"{type(model).__name__} has no feature map for Grad-CAM",
            expected="a convolutional model whose last map is larger than 1 × 1",
            fix="use a larger image side or outer ring",
        )
    return finished[-1]


def class_activation(layer: nn.Module, run: Callable[[], Tensor], classes: Tensor | None) -> Tensor:
    """Grad-CAM at ``layer``, not yet scaled: (N, H, W), 0 or more.

    Args:
        layer: makes the feature map.
        run: forward pass to logits (N, C).
        classes: (N,) whose logits are explained; None for each image's arg-max.
    """
    taken: list[Tensor] = []

    def start_graph(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        taken.append(output.detach().requires_grad_())
        return taken[-1].clone()  # a ReLU in place may follow

    hook = layer.register_forward_hook(start_graph)
    try:
        with torch.enable_grad():
            logits = run()
            chosen = logits.argmax(dim=1) if classes is None else classes.to(logits.device)
            score = logits.gather(1, chosen[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, taken[-1])
    finally:
        hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * taken[-1].detach()).sum(dim=1).relu()


def gradcam(task: PromptedTask, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Where on the prompted canvas a task looks.

    Args:
        task: a served task.
        images: (N, C, s, s) as the task takes them.
        classes: (N,) of the task; None for its own decisions.

    Returns:
        (N, S, S) on the canvas of the task's depth, each map's maximum 1 (or all 0).
    """
    images = images.to(next(task.model.parameters()).device)
    layer = last_feature_layer(task.model, lambda: task(images))
    maps = class_activation(layer, lambda: task(images), classes)
    side = task.prompt.canvas_side(task.depth)
    maps = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def region_shares(maps: Tensor, side: int, rings: tuple[int, ...]) -> list[float]:
    """Shares of saliency inside the image and on each ring up to the maps' canvas; sum 1.

    Args:
        maps: (N, S, S).
        side: image side, pixels.
        rings: canvas side after each ring; those up to S count.
    """
    canvas = maps.shape[-1]
    mean = maps.mean(dim=0)
    whole = mean.sum().clamp(min=torch.finfo(mean.dtype).tiny)
    inside = []
    for size in [side, *(ring for ring in rings if ring <= canvas)]:
        start = ring_start(size, canvas, rings)
        inside.append(float(mean[start : start + size, start : start + size].sum() / whole))
    return [inside[0], *(b - a for a, b in pairwise(inside))]


def ring_start(size: int, canvas: int, rings: tuple[int, ...]) -> int:
    """Left and top of the square of side ``size`` on a canvas, pixels (SPEC section 2)."""
    start, inner = 0, size
    for ring in rings:
        if size < ring <= canvas:
            start += (ring - inner + 1) // 2
            inner = ring
    return start
