"""Train a source model on data its owner still has: plain SGD, one cycle.

The built-in tasks' models are trained once, by :func:`ensure_source`, and cached under a name
that holds a digest of everything that decides their weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kiop_fast.config import PretrainConfig, to_dict
from kiop_fast.data import BUILT_IN, Dataset, DatasetInfo, Feed, dataset, open_feed
from kiop_fast.deliver.evaluate import source_accuracy
from kiop_fast.errors import NonFiniteLossError
from kiop_fast.runtime import draws
from kiop_fast.runtime.device import choose_device, threads
from kiop_fast.runtime.files import require_writable
from kiop_fast.runtime.progress import Progress
from kiop_fast.source import (
    Source,
    SourceSpec,
    batch_statistics,
    cache_folder,
    freeze,
    save_source,
)
from kiop_fast.source.checkpoint import no_weights
from kiop_fast.source.schemes import build_untrained

# Settings of the built-in tasks' models, each well under a minute on a free core.  The attack
# makes a provider's gradients show the shapes of its classes, which synthesis lives on; a target
# trained without it takes a prompt better (measured on the demo, seed 0, 240 prompt steps on one
# bank: agreement with the provider 0.42 with an attack of 0.5 on letters, 0.50 without).  Thread
# counts are fixed, so that the weights do not depend on the number of cores.
RECIPES: dict[str, dict[str, Any]] = {
    "letters": {"epochs": 5, "threads": 1},
    "digits": {"epochs": 30, "adversarial": 1.5, "threads": 2},
    "shapes": {"epochs": 12, "adversarial": 0.25},
}
REVISION = 2  # of this training and of the built-in tasks' drawing; part of the cache's names

_WARM_UP = 0.2  # share of the steps in which the learning rate rises
_RAMP = 0.5  # share of the steps in which the attack grows to its full length
_SETTLE = 4096  # training images over which BatchNorm statistics are averaged at the end
_SETTLE_BATCH = 512


def pretrain(
    config: PretrainConfig, out: Path | None = None, progress: Progress | None = None
) -> Path:
    """Train, measure and save one source model.

    Args:
        config: architecture, data and training settings.
        out: the file to write; by default its place in the cache.
        progress: called as ``progress(stage, done, total, loss=…)``.

    Returns:
        The file, safetensors with the facts in its header.

    Raises:
        DataError, SourceError: unknown or unreadable data, unknown or unfit architecture.
        NonFiniteLossError: the training diverged.
        RunError: the file cannot be written.
    """
    device = choose_device(config.device)
    data = dataset(config.data)
    path, arch = out or _cache_path(config), config.arch.removeprefix("torchvision:")
    require_writable(path)
    with threads(config.threads):
        classes = len(data.info.classes)
        model = build_untrained(config.arch, classes, config.side, seed=config.seed)
        source = train_source(config, data, model.to(device), progress)
        accuracy = source_accuracy(source, config.side, loading=config.loading)
    return save_source(
        path, source.model, arch=arch, info=data.info, side=config.side,
        accuracy=accuracy, extra={"config": to_dict(config), "revision": REVISION},
    )  # fmt: skip


def ensure_source(
    spec: SourceSpec, side: int, *, device: str = "auto", progress: Progress | None = None
) -> Path | None:
    """The file of a source's weights; trained and cached first where its data is built in.

    Returns:
        ``spec.path`` if it has one; None for a scheme whose models bring their weights along.

    Raises:
        SourceError: neither a path nor data that comes with kiop_fast.
    """
    if spec.path is not None or spec.scheme != "zoo":
        return spec.path
    path = cached_source_path(spec, side)
    if path is None:
        raise no_weights(spec)
    if path.exists():
        return path
    return pretrain(dataclasses.replace(recipe(spec, side), device=device), path, progress)


def recipe(spec: SourceSpec, side: int) -> PretrainConfig:
    """How the model of a built-in task is trained at an image side."""
    return PretrainConfig(arch=spec.name, data=spec.data, side=side, **RECIPES[spec.data])


def cached_source_path(spec: SourceSpec, side: int) -> Path | None:
    """Where :func:`ensure_source` keeps a source, there or not; None if it cannot train it."""
    if spec.scheme != "zoo" or spec.data not in BUILT_IN:
        return None
    return _cache_path(recipe(spec, side))


def _cache_path(config: PretrainConfig) -> Path:
    """A name with a digest of all that decides the weights, so that no old file is reused."""
    facts = {k: v for k, v in to_dict(config).items() if k != "device"}
    if config.loading.loader != "dali":  # torch's batches are what built-in tasks take by default
        del facts["loading"]
    text = json.dumps({**facts, "revision": REVISION}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    said = re.sub(r"[^\w.-]+", "-", f"{config.arch}-{config.data}")
    name = f"{said}-{config.side}-seed{config.seed}-{digest}.safetensors"
    return cache_folder() / "sources" / name


@dataclass(frozen=True)
class Training:
    """The training split: a feed of its images in [0, 1], and the labels (N,) on the device."""

    feed: Feed
    labels: Tensor


def train_source(
    config: PretrainConfig, data: Dataset, model: nn.Module, progress: Progress | None = None
) -> Source:
    """Train ``model`` in place on the training split, then freeze it."""
    source = freeze(model, data.info, name=f"{config.arch}@{config.data}", arch=config.arch)
    device = next(model.parameters()).device
    feed, labels = open_feed(
        data.train(config.side), data.info, batch=max(config.batch, _SETTLE_BATCH),
        pad=data.info.pad, normalise=False, device=device, loading=config.loading,
    )  # fmt: skip
    train = Training(feed, labels.to(device))
    if not source.rowwise:
        model.to(memory_format=torch.channels_last)
    model.train().requires_grad_(True)
    per_epoch = max(1, len(train.labels) // config.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * per_epoch, pct_start=_WARM_UP,
        cycle_momentum=False,
    )  # fmt: skip
    with _seeded(config):
        for epoch in range(config.epochs):
            losses = []
            for images, labels, lengths in _batches(config, data.info, train, epoch, per_epoch):
                if config.adversarial:
                    images = _attacked(source, images, labels, lengths)
                loss = F.cross_entropy(_logits(source, images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            mean = float(torch.stack(losses).mean())
            _check_finite(mean, config, epoch)
            if progress is not None:
                progress(f"pretrain {source.name}", epoch + 1, config.epochs, loss=mean)
    _settle_batchnorm(source, train)
    model.to(memory_format=torch.contiguous_format)
    return freeze(model, data.info, name=source.name, arch=config.arch)


@contextmanager
def _seeded(config: PretrainConfig) -> Iterator[None]:
    """Inside, dropout and stochastic depth draw from a state of this training's own."""
    rng = draws.generator(config.seed, 0, config.data, "pretrain dropout")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(rng.integers(2**63)))
        yield


def _logits(source: Source, images: Tensor) -> Tensor:
    layout = torch.contiguous_format if source.rowwise else torch.channels_last
    normal = source.normalise(images).contiguous(memory_format=layout)
    logits: Tensor = source.model(normal)
    return logits


def _batches(
    config: PretrainConfig, info: DatasetInfo, train: Training, epoch: int, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Full batches: augmented images (N, 3, s, s) in [0, 1], labels, lengths of the attack.

    A length is √u of the largest, which grows linearly over the first half of the training.
    """

    def rng(purpose: str) -> np.random.Generator:
        return draws.generator(config.seed, epoch, config.data, f"pretrain {purpose}")

    device, shape = train.labels.device, (count, config.batch)
    rows = draws.permutation_batches(rng("order"), count, config.batch, len(train.labels))
    offsets = draws.crop_offsets(rng("crop"), shape, info.pad)
    flips = draws.flips(rng("flip"), shape, info.flip)
    noise = rng("noise")
    ramp = (epoch * count + np.arange(count)) / (_RAMP * config.epochs * count)
    lengths = np.minimum(ramp, 1)[:, None] * np.sqrt(rng("attack").random(shape))
    lengths = config.adversarial * lengths
    batches = train.feed.batches(rows, offsets if info.pad else None, flips if info.flip else None)
    for step, (chosen, images) in enumerate(zip(rows.to(device), batches, strict=True)):
        images = images.expand(-1, 3, -1, -1)
        if config.noise:
            grain = draws.normal(noise, *images.shape, std=config.noise).to(device)
            images = (images + grain).clamp(0, 1)
        length = torch.from_numpy(lengths[step]).to(device, images.dtype)
        yield images, train.labels[chosen], length


def _attacked(source: Source, images: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Images moved by ``lengths`` (L2) along the gradient of their loss; the model is untouched."""
    images = images.detach().clone().requires_grad_(True)
    with batch_statistics(source.model):
        loss = F.cross_entropy(_logits(source, images), labels)
        (gradient,) = torch.autograd.grad(loss, images)
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    move = gradient * (lengths / norm)[:, None, None, None]
    return (images.detach() + move).clamp(0, 1)


@torch.no_grad()
def _settle_batchnorm(source: Source, train: Training) -> None:
    """Running statistics as the average over plain training images, which attacks had shifted."""
    layers = [m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [layer.momentum for layer in layers]
    source.model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    rows = draws.permutation_batches(
        draws.generator(0, 0, source.info.name, "pretrain settle"), 1,
        min(_SETTLE, len(train.labels)), len(train.labels),
    )[0]  # fmt: skip
    for images in train.feed.batches(rows.chunk(-(-len(rows) // _SETTLE_BATCH))):
        _logits(source, images.expand(-1, 3, -1, -1))
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum


def _check_finite(loss: float, config: PretrainConfig, epoch: int) -> None:
    if not np.isfinite(loss):
        raise NonFiniteLossError(
            f"training {config.arch} on {config.data} diverged",
            got=f"epoch {epoch + 1}: loss {loss}", expected="a finite loss",
            fix="lower the learning rate",
        )  # fmt: skip
