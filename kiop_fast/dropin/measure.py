"""Top-1, top-5 and loss on test data, as the scripts' evaluator reports them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kiop_fast.config import LoadingConfig
from kiop_fast.deliver.evaluate import read_test, task_accuracy
from kiop_fast.source import Source


def measure(
    seen: Callable[[Tensor], Tensor], source: Source, side: int, batch: int, device: torch.device
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and the mean cross-entropy ``loss``.

    Batches of ``batch`` in order: under batch statistics the numbers depend on it.  With fewer
    than five classes top-5 counts them all (the scripts fail there).

    Args:
        seen: normalised images (N, 3, side, side) → logits of the task's classes.
        source: whose data and normaliser it is.
    """
    parts: list[Tensor] = []
    # The scripts resize grey data as floating point and never round it to bytes again.
    native = source.info.side if source.info.channels == 1 else side

    def classify(images: Tensor) -> Tensor:
        if native != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        if source.info.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        parts.append(seen(source.normalise(images)).float().cpu())
        return parts[-1].to(device)

    # Decoded and resized by torch, which follows PIL, as the scripts' transforms do.
    loading = LoadingConfig(loader="torch")
    task_accuracy(classify, source.info, native, batch, device, loading)
    logits, labels = torch.cat(parts), read_test(source.info, native).labels.cpu()
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == labels[:, None]
    return {
        "top1": 100.0 * int(hits[:, 0].sum()) / len(labels),
        "top5": 100.0 * int(hits.sum()) / len(labels),
        "loss": float(F.cross_entropy(logits, labels)),
    }
