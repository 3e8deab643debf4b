"""The artefact: its size, its round trip and its damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from artefacts import COLOUR, GREY, MAPPING, make, noise, tiny_target

from kiop_fast.errors import ArtefactError
from kiop_fast.prompt.artefact import (
    Artefact,
    ArtefactTarget,
    ArtefactTask,
    load_prompt,
    save_prompt,
)
from kiop_fast.source import Source


@pytest.fixture
def target() -> Source:
    return tiny_target()


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
