"""The label mapping that a script draws, found again by replaying what it drew before.

The scripts seed torch, draw one number for a data loader, build the models (whose initial
weights are drawn and then overwritten) and take ``randperm``.  The mapping is saved nowhere; the
same draws at the same torch version give it again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kiop_fast.errors import MappingError

IMAGENET = 1000  # the scripts ask torchvision for ImageNet's models and replace the classifier


def _draw_loader() -> None:
    """What making a loader's iterator draws: the base seed of its workers."""
    iter(DataLoader(TensorDataset(torch.zeros(1, 1))))


def _draw_model(backbone: str, classes: int) -> None:
    """What building a backbone and replacing its classifier draws; the model is dropped.

    Asked for weights, torchvision leaves VGG's own initialisation out and keeps ResNet's.
    """
    from torchvision import models

    if backbone == "vgg13":
        made = models.vgg13_bn(weights=None, init_weights=False)
        nn.Linear(made.classifier[6].in_features, classes)
        return
    build: Callable[..., nn.Module] = getattr(models, backbone.lower())
    nn.Linear(build(weights=None, num_classes=IMAGENET).fc.in_features, classes)  # type: ignore[arg-type,union-attr]


def replay_mappings(script: str, flags: Namespace, classes: dict[str, int]) -> list[Tensor]:
    """The mappings that ``script`` draws under ``flags.seed`` with this torch.

    Args:
        script: ``KiOP_BF``, ``KiOP_B`` or ``KiOP_triple``.
        flags: seed and backbones.
        classes: by dataset flag, ``dataset``, ``real_dataset`` and, for three, ``son_dataset``.

    Returns:
        One a provider, (classes,) int64.  The global random state is left alone.

    Raises:
        MappingError: A has too few classes.
    """
    ours, theirs = classes["real_dataset"], [classes["dataset"]]
    if script == "KiOP_triple":
        theirs.append(classes["son_dataset"])
    if sum(theirs) > ours:
        raise MappingError(
            "one permutation of A's classes cannot serve every provider",
            got=f"A: {ours} classes, providers: {theirs}",
            expected=f"a target with at least {sum(theirs)} classes",
            fix="choose another --real_dataset",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(flags.seed)
        _draw_loader()
        _draw_model(flags.backbone_t, classes["dataset"])
        if script == "KiOP_triple":
            _draw_model(flags.backbone_l, classes["son_dataset"])
        for _ in range(1 if script == "KiOP_B" else 2):
            _draw_model(flags.backbone_s, ours)
        order = torch.randperm(ours)
    return [part.clone() for part in order[: sum(theirs)].split(theirs)]
