"""A prompt for two tasks of noise, its banks and its datasets; no test lives here."""

from __future__ import annotations

import torch
from torch import Tensor

from kiop_fast.data import DatasetInfo, Split
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.prompt.artefact import Artefact, ArtefactTarget, ArtefactTask
from kiop_fast.source import Source

COLOUR = DatasetInfo("own-colours", 8, 3, tuple("ABCDEF"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
GREY = DatasetInfo("own-greys", 8, 1, tuple("0123"), (0.1,) * 3, (0.3,) * 3)
MAPPING = torch.tensor([5, 0, 3, 2])


def pixels(count: int, channels: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, 8, 8), dtype=torch.uint8, generator=made)


def never(side: int) -> Split:
    raise AssertionError("the training split was read")


BANKS = {"own-colours": pixels(48, 3, 5), "own-greys": pixels(40, 1, 6)}


def make(target: Source, policy: str = "calibrated") -> Artefact:
    prompt = Prompt(8, (11, 16))
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(torch.randn(cells.shape, generator=torch.Generator().manual_seed(k)))
    tasks = []
    for depth, mapping, info in ((1, None, COLOUR), (2, MAPPING, GREY)):
        seen = PromptedModel(target, prompt, depth)
        images = BANKS[info.name].float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
        statistics = calibrate(seen, (images - mean) / std, 64) if policy == "calibrated" else None
        tasks.append(ArtefactTask(info.name, depth, mapping, statistics, info))
    return Artefact(
        side=8, rings=(11, 16), cells=[c.detach() for c in prompt.cells], tasks=tuple(tasks),
        target=ArtefactTarget("tiny", target.name, target.sha256, COLOUR), batchnorm=policy,
    )  # fmt: skip
