"""What a run folder holds, drawn as pictures and one page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tasks import BANKS, COLOUR, GREY, make, never

from kiop_fast import data
from kiop_fast.config_io import dump_toml, override
from kiop_fast.data import Dataset
from kiop_fast.deliver.evaluate import evaluate
from kiop_fast.deliver.report import write_report
from kiop_fast.deliver.run_data import read_banks, read_run
from kiop_fast.errors import RunError
from kiop_fast.presets import preset
from kiop_fast.prompt.artefact import save_prompt
from kiop_fast.runtime.files import atomic_write, save_tensors, write_lines
from kiop_fast.source import Source


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
