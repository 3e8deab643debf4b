"""A finished prompt and one more provider (``prompt.extend``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny

from kiop_fast.errors import ArtefactError
from kiop_fast.pipeline import train
from kiop_fast.prompt.artefact import load_prompt
from kiop_fast.source import Source
from kiop_fast.sources import Sources

Make = Callable[..., Source]


@pytest.fixture
def sources(make_source: Make) -> Sources:
    return Sources(make_source("resnet8", "letters"), (make_source("resnet8", "digits"),))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_provider_joins_and_earlier_tasks_stay_bit_identical(
    sources: Sources, make_source: Make, tmp_path: Path
) -> None:
    train(tiny(), tmp_path / "first", sources=sources)
    before = load_prompt(tmp_path / "first" / "prompt.safetensors")
    config = tiny(
        providers=["resnet8@shapes"],
        prompt={"rings": [32], "extend": str(tmp_path / "first" / "prompt.safetensors")},
    )
    more = Sources(sources.target, (make_source("resnet8", "shapes"),))
    train(config, tmp_path / "second", sources=more)
    after = load_prompt(tmp_path / "second" / "prompt.safetensors")
    assert [task.name for task in after.tasks] == ["letters", "digits", "shapes"]
    assert after.rings == (20, 28, 32)
    assert same(before.cells, after.cells[:2])
    assert bool(after.cells[2].any())
    images = torch.rand(5, 3, 16, 16)
    for task, picture in (("letters", images), ("digits", images[:, :1])):
        old = before.on(sources.target).task(task)(picture)
        new = after.on(sources.target).task(task)(picture)
        assert torch.equal(old, new)


def test_another_target_is_refused_before_anything_is_computed(
    sources: Sources, make_source: Make, tmp_path: Path
) -> None:
    train(tiny(), tmp_path / "first", sources=sources)
    extend = str(tmp_path / "first" / "prompt.safetensors")
    config = tiny(providers=["resnet8@shapes"], prompt={"rings": [32], "extend": extend})
    other = make_source("resnet8", "letters", seed=5)
    with pytest.raises(ArtefactError, match=r"(?s)another target.*--target"):
        train(config, tmp_path / "second", sources=Sources(other, sources.providers))
    assert not (tmp_path / "second" / "checkpoint.safetensors").exists()


def test_a_task_of_the_same_name_gets_a_number(sources: Sources, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "first", sources=sources)
    extend = str(tmp_path / "first" / "prompt.safetensors")
    train(tiny(prompt={"rings": [32], "extend": extend}), tmp_path / "second", sources=sources)
    after = load_prompt(tmp_path / "second" / "prompt.safetensors")
    assert [task.name for task in after.tasks] == ["letters", "digits", "digits-2"]
