"""Artefacts with random cells for a tiny target: six letters, four of them digits as well."""

from __future__ import annotations

import torch
from stand_ins import tiny_source
from torch import Tensor

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.prompt.artefact import Artefact, ArtefactTarget, ArtefactTask
from kiop_fast.source import Source, freeze

COLOUR = DatasetInfo("letters", 8, 3, tuple("ABCDEF"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
GREY = DatasetInfo("digits", 8, 1, tuple("0123"), (0.1,) * 3, (0.3,) * 3)
MAPPING = torch.tensor([5, 0, 3, 2])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_target() -> Source:
    made = tiny_source("letters", 6, seed=1)
    return freeze(made.model, COLOUR, name="tiny@letters", arch="tiny")


def make(target: Source, policy: str = "calibrated", side: int = 8,
         rings: tuple[int, ...] = (11, 16)) -> Artefact:  # fmt: skip
    """Two tasks, random cells, calibrated on noise."""
    prompt = Prompt(side, rings)
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(4 * noise(*cells.shape, seed=k) - 2)
    tasks = []
    for depth, mapping, info in ((1, None, COLOUR), (2, MAPPING, GREY)):
        statistics = None
        if policy == "calibrated":
            seen = PromptedModel(target, prompt, depth, mapping)
            images = noise(40, 3, side, side, seed=9 + depth)
            statistics = calibrate(seen, images, batch=16)
        tasks.append(ArtefactTask(info.name, depth, mapping, statistics, info))
    facts = ArtefactTarget(target.arch, target.name, target.sha256, target.info)
    return Artefact(
        side=side, rings=rings, cells=[c.detach() for c in prompt.cells], tasks=tuple(tasks),
        target=facts, batchnorm=policy, config={"side": side, "prompt": {"rings": list(rings)}},
        versions={"torch": "x"}, metrics={"epoch": 3, "accuracy": {"digits": 0.25}},
    )  # fmt: skip
