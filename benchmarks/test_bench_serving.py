"""A finished prompt at work: loading it, and the time of a prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import gates
import pytest
import torch
from measure import Measure
from sizes import Scale
from torch import Tensor
from torch.func import functional_call
from world import World, smooth_images

from kiop_fast.config import to_dict
from kiop_fast.prompt import calibrate
from kiop_fast.prompt.artefact import (
    Artefact,
    ArtefactTarget,
    ArtefactTask,
    load_prompt,
    save_prompt,
)
from kiop_fast.reference import pad_through
from kiop_fast.runtime.versions import versions

SERVERS = ("reference", "compile", "fast")


def artefact_of(made: World) -> Artefact:
    """A calibrated prompt file's content for the second task of a world."""
    job, config = made.jobs["B"], made.problem.config
    bank = job.source.normalise(smooth_images(256, config.side).to(made.device) / 255)
    statistics = calibrate(job.prompted, bank, 256)
    assert job.mapping is not None
    task = ArtefactTask("B", job.depth, job.mapping.cpu(), statistics, job.source.info)
    target = made.target
    return Artefact(
        side=config.side, rings=made.prompt.rings,
        cells=[cells.detach().cpu() for cells in made.prompt.cells], tasks=(task,),
        target=ArtefactTarget(target.arch, target.name, target.sha256, target.info),
        batchnorm="calibrated", config=to_dict(config), versions=versions(), metrics={},
    )  # fmt: skip


@pytest.fixture
def made(sizes: Scale, measure: Measure, tmp_path: Path) -> World:
    problem = sizes.problem.with_(cached=0, bank=1)
    return World(problem, engines.make("fast"), measure.session.device, tmp_path, ("B",))


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("server", SERVERS)
def test_prediction(
    server: str, count: int, made: World, sizes: Scale, measure: Measure, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if server not in request.config.getoption("engines").split(","):
        pytest.skip("not among --engines")
    save_prompt(tmp_path / "prompt.safetensors", artefact_of(made))
    loaded = load_prompt(tmp_path / "prompt.safetensors")
    task = loaded.on(made.target).task("B")
    images = smooth_images(64, made.problem.config.side)[:count].to(made.device)
    job, model = made.jobs["B"], made.target.model
    statistics = {k: v.to(made.device) for k, v in (loaded.tasks[0].statistics or {}).items()}
    assert job.mapping is not None

    def by_reference(images: Tensor) -> Tensor:
        seen = pad_through(made.prompt, job.source.normalise(images.float() / 255), job.depth)
        return functional_call(model, statistics, (seen,))[:, job.mapping]

    servers: dict[str, Callable[[Tensor], Any]] = {
        "reference": by_reference, "fast": task,
        "compile": torch.compile(task, mode="reduce-overhead"),
    }  # fmt: skip
    predict = servers[server]
    with torch.inference_mode():
        gates.check_equal("logits", predict(images), by_reference(images),
                          gates.tolerance("fp32"))  # fmt: skip
        measure(
            lambda: predict(images), group="serving", stage=f"prediction, batch {count}",
            engine=server, precision="fp32", digest=made.problem.digest(), warm=3,
            seconds=sizes.seconds,
        )  # fmt: skip


def test_loading_a_prompt(made: World, measure: Measure, tmp_path: Path) -> None:
    """From the file to a module on its model, the model's fingerprint checked."""
    path = tmp_path / "prompt.safetensors"
    given = artefact_of(made)
    save_prompt(path, given)

    def load() -> Any:
        return load_prompt(path).on(made.target).task("B")

    gates.check_equal(
        "cells", load().prompt.cells[0], given.cells[0].half().float().to(made.device), 0
    )
    measure(
        load, group="serving", stage="loading a prompt file", engine="fast", precision="fp32",
        digest=hashlib.sha256(made.problem.digest().encode()).hexdigest()[:12], rounds=5,
        bytes_moved=path.stat().st_size,
    )  # fmt: skip
