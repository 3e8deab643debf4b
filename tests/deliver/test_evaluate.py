"""Accuracy, evaluation between floor and ceiling, and prediction of image files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import tiny_source
from tiny_tasks import BANKS, COLOUR, GREY, MAPPING, make, pixels
from torch import Tensor

from kiop_fast.data import DatasetInfo
from kiop_fast.deliver import console
from kiop_fast.deliver.evaluate import evaluate, source_accuracy, task_accuracy, untrained
from kiop_fast.deliver.predict import predict, read_image
from kiop_fast.errors import ArtefactError, DataError
from kiop_fast.prompt import (
    Prompt,
    PromptedModel,
    calibrate,
    count_table,
    frequency_mapping,
    likelihood_mapping,
)
from kiop_fast.source import Source


class TestAccuracy:
    def test_counts_right_answers(self) -> None:
        # 50 labels 0,1,…,5,0,1,…: class 1 occurs at 1, 7, …, 49, nine times
        def always_one(images: Tensor) -> Tensor:
            return torch.tensor([0.0, 1, 0, 0, 0, 0]).expand(len(images), 6)

        for batch in (1, 7, 64):
            assert task_accuracy(always_one, COLOUR, 8, batch) == 9 / 50

    def test_sees_images_between_0_and_1(self) -> None:
        seen = []

        def look(images: Tensor) -> Tensor:
            seen.append(images)
            return torch.zeros(len(images), 4)

        assert task_accuracy(look, GREY, 8, 10) == 6 / 23  # labels 0, 4, …, 20
        expected = pixels(23, 1, 23).float() / 255
        assert torch.equal(torch.cat(seen), expected)
        assert [len(part) for part in seen] == [10, 10, 3]

    def test_a_source(self, provider: Source) -> None:
        images = (pixels(23, 1, 23).float() / 255 - 0.1) / 0.3
        with torch.no_grad():
            decided = provider.model(images.expand(-1, 3, -1, -1)).argmax(1)
        expected = float((decided == torch.arange(23) % 4).float().mean())
        assert source_accuracy(provider, 8) == pytest.approx(expected)

    def test_unknown_data(self) -> None:
        with pytest.raises(DataError, match="unknown dataset"):
            task_accuracy(lambda x: x, DatasetInfo("nothing", 8, 1, ("a",)), 8)


class TestEvaluate:
    @pytest.mark.parametrize("policy", ["calibrated", "running", "batch"])
    def test_every_number(self, policy: str, target: Source, provider: Source) -> None:
        artefact = make(target, policy)
        found = evaluate(artefact, target, {"own-greys": provider}, banks=BANKS)
        assert json.loads(json.dumps(found)) == found
        assert found["batchnorm"] == policy
        served = artefact.on(target)
        for name, info in (("own-colours", COLOUR), ("own-greys", GREY)):
            facts = found["tasks"][name]
            assert facts["accuracy"] == task_accuracy(served.task(name), info, 8)
            assert found["policies"][policy][name] == facts["accuracy"]
        ours, theirs = found["tasks"]["own-colours"], found["tasks"]["own-greys"]
        assert ours["ceiling"] == source_accuracy(target, 8)
        assert theirs["ceiling"] == source_accuracy(provider, 8)
        assert (ours["images"], theirs["images"]) == (50, 23)
        assert ours["oracle"] is None
        expected = {"batch", "running"} | ({"calibrated"} if policy == "calibrated" else set())
        assert set(found["policies"]) == expected

    def test_the_oracle_is_the_best_mapping_of_the_test_labels(
        self, target: Source, provider: Source
    ) -> None:
        artefact = make(target, "running")
        module = artefact.on(target).task("own-greys")
        labels = torch.arange(23) % 4
        logits = module.target_logits(pixels(23, 1, 23))
        table = np.zeros((6, 4))
        for s, t in zip(logits.argmax(1).tolist(), labels.tolist(), strict=True):
            table[s, t] += 1
        counted, free = [-1] * 4, table.copy()
        for _ in range(4):
            s, t = divmod(int(free.argmax()), 4)
            counted[t] = s
            free[s, :] = free[:, t] = -1

        def accuracy(mapping: Sequence[int]) -> float:
            return float((logits[:, list(mapping)].argmax(1) == labels).float().mean())

        sure = torch.eye(4).log()[labels]
        own = artefact.task("own-greys").mapping
        likely = likelihood_mapping(logits, sure, own)
        found = evaluate(artefact, target, {}, banks=BANKS)["tasks"]["own-greys"]
        best = max(accuracy(mapping) for mapping in (own.tolist(), counted, likely.tolist()))
        assert found["oracle"] == pytest.approx(best)
        assert found["ceiling"] is None
        assert found["floor"] is None

    def test_the_floor_is_an_untrained_prompt(self, target: Source, provider: Source) -> None:
        artefact = make(target)
        task = artefact.task("own-greys")
        counted, likely = untrained(artefact, target, task, provider, BANKS["own-greys"])
        images = (BANKS["own-greys"].float() / 255 - 0.1) / 0.3
        prompt = Prompt(8, (11, 16))
        statistics = calibrate(PromptedModel(target, prompt, 2), images.expand(-1, 3, -1, -1), 256)
        for bare in (counted, likely):
            assert not any(cells.any() for cells in bare.cells)
            for name, value in bare.tasks[0].statistics.items():
                torch.testing.assert_close(value, statistics[name])
        modules = [bare.on(target).task("own-greys") for bare in (counted, likely)]
        ours = modules[0].target_logits(BANKS["own-greys"].float() / 255)
        with torch.no_grad():
            theirs = provider.model(images.expand(-1, 3, -1, -1))
        table = count_table(ours.argmax(1), theirs.argmax(1), (6, 4))
        expected = frequency_mapping(table)
        assert counted.tasks[0].mapping.equal(expected)
        assert likely.tasks[0].mapping.equal(likelihood_mapping(ours, theirs, expected))
        found = evaluate(artefact, target, {"own-greys": provider}, banks=BANKS)
        best = max(task_accuracy(module, GREY, 8) for module in modules)
        assert found["tasks"]["own-greys"]["floor"] == best
        assert artefact.task("own-greys").mapping.equal(MAPPING), "the artefact keeps its own"

    def test_without_banks_there_is_no_floor(self, target: Source, provider: Source) -> None:
        found = evaluate(make(target), target, {"own-greys": provider})
        assert [facts["floor"] for facts in found["tasks"].values()] == [None, None]

    def test_another_model_is_refused(self, target: Source) -> None:
        other = tiny_source("letters", 6, seed=4)
        with pytest.raises(ArtefactError, match="not the model"):
            evaluate(make(target), other, {})


class TestPredict:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        paths = []
        for i, mode in enumerate(("L", "RGB", "RGBA")):
            path = tmp_path / f"{mode}.png"
            Image.new(mode, (20, 13), 40 * (i + 1) if mode == "L" else (200, 90, 10 + i)).save(path)
            paths.append(path)
        return paths

    def test_classes_and_probabilities(self, target: Source, files: list[Path]) -> None:
        served = make(target).on(target)
        said = predict(served, files, top=9)
        assert [(one.file, one.task) for one in said] == [
            (file, task) for task in ("own-colours", "own-greys") for file in files
        ]
        for one, names in zip(said, ["ABCDEF"] * 3 + ["0123"] * 3, strict=True):
            assert sorted(name for name, _ in one.best) == sorted(names)
            chances = [chance for _, chance in one.best]
            assert chances == sorted(chances, reverse=True)
            assert sum(chances) == pytest.approx(1, abs=1e-5)
        flat = torch.full((1, 1, 8, 8), 40, dtype=torch.uint8)
        logits = served.task("own-greys")(flat)[0]
        first = predict(served, files[:1], task="own-greys", top=1)[0].best
        assert first[0][0] == "0123"[int(logits.argmax())]
        assert first[0][1] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)

    def test_reading(self, files: list[Path]) -> None:
        grey, colour = read_image(files[0], 8, 1), read_image(files[1], 8, 3)
        assert grey.equal(torch.full((1, 8, 8), 40, dtype=torch.uint8))
        assert colour[:, 3, 3].tolist() == [200, 90, 11]
        assert read_image(files[0], 8, 1, invert=True)[0, 0, 0] == 255 - 40

    def test_sixteen_bits(self, tmp_path: Path) -> None:
        levels = np.full((8, 8), 100 * 257, dtype=np.uint16)
        Image.fromarray(levels).save(tmp_path / "deep.png")
        assert read_image(tmp_path / "deep.png", 8, 3).unique().tolist() == [100]

    @pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken", None])
    def test_an_unreadable_image_is_named(
        self, content: bytes | None, target: Source, files: list[Path], tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.png"
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.png"):
            predict(make(target).on(target), [*files, bad])

    def test_a_cut_image(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        Image.fromarray(np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3)).save(
            buffer, format="PNG"
        )
        (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-200])
        with pytest.raises(DataError, match=r"cut\.png"):
            read_image(tmp_path / "cut.png", 8, 3)


def test_mean_and_standard_deviation() -> None:
    mean, std = console.mean_and_std([0.2, 0.4, 0.6])
    assert (mean, std) == (pytest.approx(0.4), pytest.approx(0.2))
    assert console.mean_and_std([0.3]) == (0.3, 0.0)
