"""Evaluation, prediction, Grad-CAM, progress and the report."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import tiny_source
from torch import Tensor, nn

from kiop_fast import data
from kiop_fast.config_io import dump_toml, override
from kiop_fast.data import Dataset, DatasetInfo, Split
from kiop_fast.deliver import console
from kiop_fast.deliver.evaluate import evaluate, source_accuracy, task_accuracy, untrained
from kiop_fast.deliver.gradcam import (
    class_activation,
    gradcam,
    last_feature_layer,
    region_shares,
    ring_start,
)
from kiop_fast.deliver.predict import predict, read_image
from kiop_fast.deliver.report import write_report
from kiop_fast.deliver.run_data import read_banks, read_run
from kiop_fast.errors import ArtefactError, DataError, RunError, SourceError
from kiop_fast.presets import preset
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.prompt.artefact import Artefact, ArtefactTarget, ArtefactTask, save_prompt
from kiop_fast.runtime.files import atomic_write, save_tensors, write_lines
from kiop_fast.runtime.progress import RichProgress, SilentProgress, make_progress
from kiop_fast.source import Source, freeze

COLOUR = DatasetInfo("own-colours", 8, 3, tuple("ABCDEF"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
GREY = DatasetInfo("own-greys", 8, 1, tuple("0123"), (0.1,) * 3, (0.3,) * 3)
MAPPING = torch.tensor([5, 0, 3, 2])


def pixels(count: int, channels: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, 8, 8), dtype=torch.uint8, generator=made)


def never(side: int) -> Split:
    raise AssertionError("the training split was read")


@pytest.fixture(autouse=True)
def _datasets() -> Iterator[None]:
    """Two datasets with test splits of noise, 50 and 23 images."""
    for info, count in ((COLOUR, 50), (GREY, 23)):
        split = Split(pixels(count, info.channels, count),
                      torch.arange(count) % len(info.classes))  # fmt: skip
        data.registry._DATASETS[info.name] = Dataset(info, never, lambda side, s=split: s)
    yield
    for info in (COLOUR, GREY):
        del data.registry._DATASETS[info.name]


@pytest.fixture
def target() -> Source:
    return freeze(tiny_source("a", 6, seed=1).model, COLOUR, name="tiny@colours", arch="tiny")


@pytest.fixture
def provider() -> Source:
    return freeze(tiny_source("b", 4, seed=2).model, GREY, name="tiny@greys", arch="tiny")


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

    def test_the_oracle_is_the_greedy_mapping_of_the_test_labels(
        self, target: Source, provider: Source
    ) -> None:
        artefact = make(target, "running")
        module = artefact.on(target).task("own-greys")
        labels = torch.arange(23) % 4
        logits = module.target_logits(pixels(23, 1, 23))
        table = np.zeros((6, 4))
        for s, t in zip(logits.argmax(1).tolist(), labels.tolist(), strict=True):
            table[s, t] += 1
        mapping, free = [-1] * 4, table.copy()
        for _ in range(4):
            s, t = divmod(int(free.argmax()), 4)
            mapping[t] = s
            free[s, :] = free[:, t] = -1
        expected = float((logits[:, mapping].argmax(1) == labels).float().mean())
        found = evaluate(artefact, target, {}, banks=BANKS)["tasks"]["own-greys"]
        assert found["oracle"] == pytest.approx(expected)
        assert found["ceiling"] is None
        assert found["floor"] is None

    def test_the_floor_is_an_untrained_prompt(self, target: Source, provider: Source) -> None:
        artefact = make(target)
        task = artefact.task("own-greys")
        bare = untrained(artefact, target, task, provider, BANKS["own-greys"])
        assert not any(cells.any() for cells in bare.cells)
        images = (BANKS["own-greys"].float() / 255 - 0.1) / 0.3
        prompt = Prompt(8, (11, 16))
        statistics = calibrate(PromptedModel(target, prompt, 2), images.expand(-1, 3, -1, -1), 256)
        for name, value in bare.tasks[0].statistics.items():
            torch.testing.assert_close(value, statistics[name])
        found = evaluate(artefact, target, {"own-greys": provider}, banks=BANKS)
        module = bare.on(target).task("own-greys")
        assert found["tasks"]["own-greys"]["floor"] == task_accuracy(module, GREY, 8)
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


class TwoFilters(nn.Module):
    """Feature map [x, 2x], mean pool, two classes: by hand, dy_c/dF_k = v[c, k] / (H·W)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
            self.classify.weight.copy_(torch.tensor([[3.0, -1.0], [1.0, -2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pool(self.features(x)).flatten(1))


class TestGradCam:
    def test_by_hand(self) -> None:
        model = TwoFilters().requires_grad_(False)
        x = torch.tensor([[1.0, -2.0], [0.5, 0.0]]).view(1, 1, 2, 2)
        layer = last_feature_layer(model, lambda: model(x))
        assert layer is model.features
        # class 0: (3·x - 1·2x)/4 = x/4; class 1: (1·x - 2·2x)/4 = -3x/4; negative parts are cut
        for label, expected in ((0, [[0.25, 0], [0.125, 0]]), (1, [[0, 1.5], [0, 0]])):
            cam = class_activation(layer, lambda: model(x), torch.tensor([label]))
            torch.testing.assert_close(cam[0], torch.tensor(expected))
        assert not model.features._forward_hooks
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("policy", ["calibrated", "running", "batch"])
    def test_of_a_served_task(self, policy: str, target: Source) -> None:
        module = make(target, policy).on(target).task("own-greys")
        with torch.no_grad():  # asked for from inside no_grad as well
            maps = gradcam(module, BANKS["own-greys"][:6])
        assert maps.shape == (6, 16, 16)
        assert not maps.requires_grad
        peaks = maps.amax((1, 2))
        assert bool(((peaks - 1).abs() < 1e-6).logical_or(peaks == 0).all())
        assert float(maps.min()) >= 0
        target.check_unchanged()

    def test_a_model_without_maps(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        with pytest.raises(SourceError, match="no feature map"):
            last_feature_layer(model, lambda: model(torch.zeros(1, 1, 2, 2)))

    def test_shares_of_the_regions(self) -> None:
        # side 8 → 11 → 16: the image starts at 2 of 11, that at 3 of 16
        assert ring_start(8, 11, (11, 16)) == 2
        assert ring_start(11, 16, (11, 16)) == 3
        assert ring_start(8, 16, (11, 16)) == 5
        even = torch.ones(2, 16, 16)
        expected = [64 / 256, (121 - 64) / 256, (256 - 121) / 256]
        assert region_shares(even, 8, (11, 16)) == pytest.approx(expected)
        assert region_shares(torch.ones(1, 11, 11), 8, (11, 16)) == pytest.approx(
            [64 / 121, 57 / 121]
        )


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if tag == "img":
            self.images.append(facts["src"] or "")
        self.links += [v for k, v in facts.items() if k in ("href", "src") and tag != "img" and v]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(text)


class TestReport:
    @pytest.fixture
    def run(self, target: Source, tmp_path: Path) -> Path:
        config = override(preset("demo"), {"side": 8, "prompt": {"rings": [11, 16]}})
        atomic_write(tmp_path / "config.toml", dump_toml(config))
        save_prompt(tmp_path / "prompt.safetensors", make(target))
        for name, images in BANKS.items():
            classes = 6 if images.shape[1] == 3 else 4
            for epoch, part in enumerate(images.chunk(2)):
                tensors = {"images": part, "targets": torch.arange(len(part)) % classes,
                           "features": torch.zeros(len(part), 2)}  # fmt: skip
                save_tensors(tmp_path / "banks" / name / f"{epoch:05d}.safetensors", tensors, {})
        write_lines(tmp_path / "metrics.jsonl", [
            {"epoch": 1, "loss": {"own-colours.kl": 2.0, "own-greys.total": 9.0},
             "agreement": {"own-greys": 0.1}, "mapping_changed": {}},
            {"epoch": 2, "accuracy": {"own-colours": 0.5, "own-greys": 0.25},
             "loss": {"own-colours.kl": 1.0}, "agreement": {"own-greys": 0.2},
             "mapping_changed": {}},
        ])  # fmt: skip
        write_lines(tmp_path / "timings.jsonl", [{"epoch": 1, "seconds": 60.0}])
        return tmp_path

    def test_pictures_and_page(self, run: Path, target: Source, provider: Source) -> None:
        banks = {name: bank.images for name, bank in read_banks(run).items()}
        assert all(torch.equal(banks[name], BANKS[name]) for name in BANKS)
        found = evaluate(make(target), target, {"own-greys": provider}, banks=banks)
        atomic_write(run / "evaluation.json", json.dumps(found))
        heard = []
        page = write_report(run, target=target, progress=lambda *a, **v: heard.append(a))
        names = {"prompt", "curves", "images-own-colours", "images-own-greys",
                 "mapping-own-greys", "gradcam"}  # fmt: skip
        assert {path.stem for path in (run / "report").glob("*.png")} == names
        assert heard[-1] == ("report", 6, 6)
        for path in (run / "report").glob("*.png"):
            shown = np.asarray(Image.open(path).convert("L"))
            assert shown.std() > 5, f"{path.name} is blank"
        parsed = Page()
        parsed.feed(page.read_text())
        assert not parsed.open
        assert len(parsed.images) == 6
        assert all(src.startswith("data:image/png;base64,") for src in parsed.images)
        assert not parsed.links, "the page needs nothing but itself"
        accuracy = found["tasks"]["own-greys"]["accuracy"]
        assert f"{100 * accuracy:.1f} %" in parsed.cells

    def test_from_synthetic_images_alone(
        self, run: Path, target: Source, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for info in (COLOUR, GREY):
            monkeypatch.setitem(data.registry._DATASETS, info.name, Dataset(info, never, never))
        text = write_report(run, target=target).read_text()
        assert "50.0 %" in text, "accuracies of the last epoch stand in"

    def test_an_unfinished_run(self, run: Path) -> None:
        (run / "prompt.safetensors").unlink()
        (run / "metrics.jsonl").unlink()
        assert write_report(run).exists()
        assert not list((run / "report").glob("*.png"))

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no run folder"):
            write_report(tmp_path)

    def test_damage(self, run: Path) -> None:
        (run / "metrics.jsonl").write_text("{")
        with pytest.raises(RunError, match="damaged"):
            read_run(run)
        bank = run / "banks" / "own-greys" / "00000.safetensors"
        bank.write_bytes(bank.read_bytes()[:50])
        with pytest.raises(RunError, match="bank"):
            read_banks(run)

    def test_the_newest_examples_come_first(self, run: Path) -> None:
        bank = read_banks(run)["own-greys"]
        rows = [row for row in range(40) if row % 20 % 4 == 2]
        assert torch.equal(bank.examples(2, 3), BANKS["own-greys"][rows[::-1][:3]])
        first = [max(row for row in range(40) if row % 20 % 4 == k) for k in (0, 1, 2, 3)]
        assert torch.equal(bank.spread(5, 4)[:4], BANKS["own-greys"][first])
        assert len(bank.spread(5, 4)) == 5


class TestProgress:
    def test_silent_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with make_progress() as progress:
            assert isinstance(progress, SilentProgress)
            progress("store", 1, 2, loss=0.5)
        assert capsys.readouterr() == ("", "")

    def test_bars(self) -> None:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=100)
        with RichProgress(console, interval=0.0) as progress:
            for epoch in (1, 2):
                for stage in ("synthesize digits", "store"):
                    for done in range(1, 4):
                        progress(f"epoch {epoch}/2  {stage}", done, 3, loss=0.125)
                        progress._bars.refresh()
            assert progress._bars.tasks[0].completed == 200, "both epochs of the run"
        for word in ("epoch 2/2", "synthesize digits", "store", "loss 0.125"):
            assert word in text.getvalue()


def test_mean_and_standard_deviation() -> None:
    mean, std = console.mean_and_std([0.2, 0.4, 0.6])
    assert (mean, std) == (pytest.approx(0.4), pytest.approx(0.2))
    assert console.mean_and_std([0.3]) == (0.3, 0.0)
