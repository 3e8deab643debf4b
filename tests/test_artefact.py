"""The artefact: its size, its round trip, its damage, and batch independence when served."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from stand_ins import tiny_source
from torch import Tensor, nn
from torch.nn import functional as F

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import ArtefactError, DataError
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.prompt.artefact import (
    Artefact,
    ArtefactTarget,
    ArtefactTask,
    load_prompt,
    save_prompt,
)
from kiop_fast.source import Source, freeze

COLOUR = DatasetInfo("letters", 8, 3, tuple("ABCDEF"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
GREY = DatasetInfo("digits", 8, 1, tuple("0123"), (0.1,) * 3, (0.3,) * 3)
MAPPING = torch.tensor([5, 0, 3, 2])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def target() -> Source:
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


def header_of(path: Path) -> dict[str, dict]:
    """The safetensors header, read by its published layout: length, then JSON."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


def test_the_papers_setting_takes_92160_bytes_of_cells(target: Source, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    artefact = make(target, "running", side=32, rings=(36, 128))
    save_prompt(path, artefact)
    entries = {name: entry for name, entry in header_of(path).items() if name.startswith("ring.")}
    sizes = [end - start for start, end in (entry["data_offsets"] for entry in entries.values())]
    assert {entry["dtype"] for entry in entries.values()} == {"F16"}
    assert sum(sizes) == 2 * 3 * (128**2 - 32**2) == 92_160
    assert artefact.cells_bytes == 92_160
    assert artefact.statistics_bytes == 0


def test_statistics_are_counted_apart(target: Source) -> None:
    channels = 6 + 9  # of the two BatchNorm layers
    assert make(target).statistics_bytes == 2 * channels * 2 * 4  # tasks, channels, mean/var, fp32


@pytest.mark.parametrize("policy", ["calibrated", "running", "batch"])
def test_round_trip_is_exact(policy: str, target: Source, tmp_path: Path) -> None:
    made = make(target, policy)
    save_prompt(tmp_path / "a.safetensors", made)
    read = load_prompt(tmp_path / "a.safetensors")
    for left, right in zip(made.cells, read.cells, strict=True):
        assert right.dtype == torch.float16
        assert torch.equal(left, right)
    for mine, theirs in zip(made.tasks, read.tasks, strict=True):
        assert (mine.name, mine.depth, mine.info) == (theirs.name, theirs.depth, theirs.info)
        assert (mine.mapping is None) == (theirs.mapping is None)
        assert mine.mapping is None or torch.equal(mine.mapping, theirs.mapping)
        assert (mine.statistics is None) == (policy != "calibrated")
        for name, value in (mine.statistics or {}).items():
            assert torch.equal(value, theirs.statistics[name])
    for fact in ("side", "rings", "target", "batchnorm", "config", "versions", "metrics"):
        assert getattr(read, fact) == getattr(made, fact)
    save_prompt(tmp_path / "b.safetensors", read)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    images = noise(5, 1, 8, 8)
    assert torch.equal(
        made.on(target).task("digits")(images), read.on(target).task("digits")(images)
    )


def test_cells_are_rounded_on_construction(target: Source) -> None:
    third = Artefact(
        side=8, rings=(9,), cells=[torch.full((3, 17), 1 / 3)],
        tasks=(ArtefactTask("letters", 1, None, None, COLOUR),),
        target=ArtefactTarget("tiny", "t", target.sha256, COLOUR),
        batchnorm="running",
    )  # fmt: skip
    # 1/3 in half precision: 0x3555 = 2^-2 · (1 + 341/1024)
    assert float(third.prompt().cells[0][0, 0]) == 0.25 * (1 + 341 / 1024)


def test_served_logits_from_first_principles(target: Source) -> None:
    artefact = make(target, "running")
    grey = noise(3, 1, 8, 8)
    x = (grey.expand(-1, 3, -1, -1) - 0.1) / 0.3
    for side, ring in zip((11, 16), artefact.prompt().squares(), strict=True):
        left, right = (side - x.shape[-1] + 1) // 2, (side - x.shape[-1]) // 2
        inside = F.pad(torch.ones(x.shape[-2:]), (left, right, left, right))
        x = F.pad(x, (left, right, left, right)) + ring.sigmoid() * (1 - inside)
    expected = target.model(x)[:, [5, 0, 3, 2]]
    task = artefact.on(target).task("digits")
    assert task.classes == ("0", "1", "2", "3")
    assert task.side == 8
    assert not task.training
    torch.testing.assert_close(task(grey), expected, atol=1e-5, rtol=1e-5)
    # three equal channels are the same grey image; a tenth of 255 is the same uint8
    torch.testing.assert_close(task(grey.expand(-1, 3, -1, -1)), expected, atol=1e-5, rtol=1e-5)
    levels = (grey * 255).to(torch.uint8)
    torch.testing.assert_close(task(levels), task(levels.float() / 255))


@pytest.mark.parametrize("policy", ["calibrated", "running"])
@pytest.mark.parametrize("name", ["letters", "digits"])
def test_batch_independence(policy: str, name: str, target: Source) -> None:
    task = make(target, policy).on(target).task(name)
    images = noise(64, 3, 8, 8)
    whole = task(images)
    for batch in (1, 7, 64):
        parts = torch.cat([task(part) for part in images.split(batch)])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(task(images[order]), whole[order], atol=1e-5, rtol=0)


def test_under_policy_batch_the_batch_matters(target: Source) -> None:
    task = make(target, "batch").on(target).task("letters")
    images = noise(8, 3, 8, 8)
    assert not torch.allclose(task(images)[:1], task(images[:1]), atol=1e-3)


def test_serving_leaves_the_model_as_it_was(target: Source) -> None:
    for policy in ("calibrated", "running", "batch"):
        make(target, policy).on(target).task("letters").train()(noise(4, 3, 8, 8))
    target.check_unchanged()


def test_another_dtype_and_a_bare_module(target: Source) -> None:
    artefact = make(target)
    images = noise(4, 3, 8, 8)
    expected = artefact.on(target.model).task("letters")(images)
    task = artefact.on(target.model, check=False).task("letters").double()
    assert task(images).dtype == torch.float64
    torch.testing.assert_close(task(images).float(), expected, atol=1e-4, rtol=1e-4)


def test_another_model_is_refused_unless_allowed(target: Source) -> None:
    artefact, other = make(target), tiny_source("letters", 6, seed=2)
    with pytest.raises(ArtefactError, match=r"(?s)not the model.*sha256"):
        artefact.on(other)
    assert artefact.on(other, check=False).task("digits")(noise(2, 1, 8, 8)).shape == (2, 4)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ArtefactError, match="do not fit this model"):
        artefact.on(plain, check=False).task("digits")


def test_another_policy_on_request(target: Source) -> None:
    calibrated, running = make(target), make(target, "running")
    images = noise(4, 3, 8, 8)
    asked = calibrated.on(target, batchnorm="running").task("letters")(images)
    assert torch.equal(asked, running.on(target).task("letters")(images))
    with pytest.raises(ArtefactError, match="no calibrated"):
        running.on(target, batchnorm="calibrated").task("letters")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 9, 9), r"\(N, 3, 8, 8\)"),
        (torch.rand(2, 2, 8, 8), r"\(N, 1, 8, 8\)"),
        (torch.rand(3, 8, 8), r"got: .*\(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8"),
    ],
)
def test_wrong_images(images: Tensor, message: str, target: Source) -> None:
    with pytest.raises(DataError, match=message):
        make(target).on(target).task("letters")(images)


def test_unknown_task(target: Source) -> None:
    artefact = make(target)
    for find in (artefact.task, artefact.on(target).task):
        with pytest.raises(ArtefactError, match="did you mean digits"):
            find("digit")


@pytest.mark.parametrize(
    "change",
    [
        {"rings": (11, 15)},
        {"rings": (11,)},
        {"batchnorm": "frozen"},
        {"tasks": ()},
        {"target": ArtefactTarget("tiny", "t", "0" * 64, GREY)},
        {"tasks": (ArtefactTask("digits", 3, MAPPING, None, GREY),)},
        {"tasks": (ArtefactTask("digits", 2, MAPPING[:3], None, GREY),)},
        {"tasks": (ArtefactTask("digits", 2, MAPPING + 1, None, GREY),)},
        {"tasks": (ArtefactTask("digits", 2, None, None, GREY),)},
        {"tasks": (ArtefactTask("digits", 2, MAPPING, None, GREY),) * 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parts_that_do_not_fit(change: dict, target: Source) -> None:
    made = make(target)
    parts = {name: getattr(made, name) for name in
             ("side", "rings", "cells", "tasks", "target", "batchnorm")}  # fmt: skip
    with pytest.raises(ArtefactError):
        Artefact(**{**parts, **change})


class TestDamage:
    @pytest.fixture
    def path(self, target: Source, tmp_path: Path) -> Path:
        save_prompt(tmp_path / "prompt.safetensors", make(target))
        return tmp_path / "prompt.safetensors"

    def test_one_flipped_bit_anywhere(self, path: Path) -> None:
        raw = path.read_bytes()
        where = torch.randint(len(raw), (150,), generator=torch.Generator().manual_seed(0))
        for position in [0, 3, 8, 9, len(raw) - 1, *where.tolist()]:
            flipped = bytearray(raw)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(ArtefactError):
                load_prompt(path)
        path.write_bytes(raw)
        load_prompt(path)

    def test_truncated_empty_and_garbage(self, path: Path) -> None:
        raw = path.read_bytes()
        for content in (raw[:-1], raw[: len(raw) // 2], raw[:100], raw[:7], b"", b"\x00" * 64,
                        b"not a prompt", raw + b"x"):  # fmt: skip
            path.write_bytes(content)
            with pytest.raises(ArtefactError, match="damaged"):
                load_prompt(path)

    def test_a_pickle_is_never_run(self, path: Path) -> None:
        torch.save({"weights": torch.zeros(3)}, path)
        with pytest.raises(ArtefactError, match="damaged"):
            load_prompt(path)

    def test_someone_elses_safetensors(self, path: Path) -> None:
        import safetensors.torch

        safetensors.torch.save_file({"ring.1": torch.zeros(3)}, path, metadata={"format": "pt"})
        with pytest.raises(ArtefactError, match="no prompt file"):
            load_prompt(path)

    def test_another_version(self, path: Path) -> None:
        raw = path.read_bytes()
        assert raw.count(b'\\"version\\": 1}') == 1
        path.write_bytes(raw.replace(b'\\"version\\": 1}', b'\\"version\\": 9}'))
        with pytest.raises(ArtefactError, match=r"(?s)version.*9.*expected: 1"):
            load_prompt(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="no such prompt file"):
            load_prompt(tmp_path / "none.safetensors")
        with pytest.raises(ArtefactError, match="no such prompt file"):
            load_prompt(tmp_path)
