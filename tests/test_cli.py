"""The command line: settings arrive, errors are one message, tables come out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_ins import tiny_source
from typer.testing import CliRunner

import kiop_fast
from kiop_fast import commands, pipeline
from kiop_fast.cli import app
from kiop_fast.config import RunConfig
from kiop_fast.config_io import dump_toml, from_dict, tomllib
from kiop_fast.data import dataset
from kiop_fast.errors import ConfigError
from kiop_fast.presets import PRESETS, preset
from kiop_fast.prompt import Prompt
from kiop_fast.prompt.artefact import Artefact, ArtefactTarget, ArtefactTask, save_prompt
from kiop_fast.runtime.files import atomic_write, save_tensors
from kiop_fast.source import freeze
from kiop_fast.sources import Sources


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tiny_sources() -> Sources:
    target = tiny_source("a", 26, seed=1).model
    provider = tiny_source("b", 10, seed=2).model
    return Sources(
        freeze(target, dataset("letters").info, name="tiny@letters", arch="tiny"),
        (freeze(provider, dataset("digits").info, name="tiny@digits", arch="tiny"),),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of two tiny models, which every command then finds."""
    sources = tiny_sources()
    monkeypatch.setattr("kiop_fast.sources.load_sources", lambda *a: sources)
    config = preset("demo")
    prompt = Prompt(16, (20, 32))
    tasks = (
        ArtefactTask("letters", 1, None, None, sources.target.info),
        ArtefactTask("digits", 2, torch.arange(10) + 3, None, sources.providers[0].info),
    )
    made = Artefact(
        side=16, rings=(20, 32), cells=[c.detach() for c in prompt.cells], tasks=tasks,
        target=ArtefactTarget("tiny", "tiny@letters", sources.target.sha256, sources.target.info),
        batchnorm="running", config=json.loads(json.dumps(tomllib.loads(dump_toml(config)))),
        versions={"torch": "x"}, metrics={"epoch": 1, "accuracy": {"digits": 0.25}},
    )  # fmt: skip
    out = tmp_path / "run"
    save_prompt(out / "prompt.safetensors", made)
    atomic_write(out / "config.toml", dump_toml(config))
    for name, channels in (("letters", 3), ("digits", 1)):
        images = torch.randint(256, (20, channels, 16, 16), dtype=torch.uint8)
        save_tensors(out / "banks" / name / "00000.safetensors",
                     {"images": images, "targets": torch.arange(20) % 10}, {})  # fmt: skip
    return out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path, bool]]:
    """Calls of the pipeline, which itself does nothing."""
    calls: list[tuple[RunConfig, Path, bool]] = []

    def train(config: RunConfig, out: Path, *, resume: bool, progress: Any, profile: bool) -> Any:
        calls.append((config, out, resume))
        atomic_write(out / "config.toml", dump_toml(config))
        accuracy = {"letters": 0.5 + config.seed / 10, "digits": 0.25}
        return pipeline.RunResult(out, None, accuracy, [{"epoch": 1, "accuracy": accuracy}], 1.0)

    monkeypatch.setattr(pipeline, "train", train)
    return calls


class TestSettings:
    def test_the_demo_by_default(self) -> None:
        assert commands.train_config(None, None, {"seed": None}, []) == preset("demo")

    def test_preset_file_flags_overrides_in_that_order(self, tmp_path: Path) -> None:
        file = tmp_path / "run.toml"
        file.write_text(
            'preset = "paper-b"\nepochs = 7\nseed = 7\n[storing]\nlr = 0.7\nbatch = 7\n'
        )
        made = commands.train_config(
            None, file, {"seed": 8, "epochs": 8, "engine": None}, ["epochs=9", "storing.lr=0.9"]
        )
        assert (made.preset, made.mode) == ("paper-b", "b")
        assert (made.storing.batch, made.seed, made.epochs, made.storing.lr) == (7, 8, 9, 0.9)
        assert commands.train_config("paper-t", file, {}, ["mode=t"]).preset == "paper-t"

    def test_a_run_continues_with_its_own_settings(self, tmp_path: Path) -> None:
        config = commands.train_config("demo", None, {"seed": 5}, ["storing.lr=0.3"])
        (tmp_path / "config.toml").write_text(dump_toml(config))
        assert commands.train_config(None, None, {}, [], resume=tmp_path) == config
        assert commands.train_config(None, None, {}, [], resume=tmp_path / "new").seed == 0

    def test_default_folder(self) -> None:
        out = commands.default_out(preset("demo"))
        assert out == Path("runs/demo-resnet8@letters-resnet8@digits-s0")
        made = commands.train_config(
            "paper-bf", None, {"target": "zoo:resnet18@cifar100=/some/where.pth", "seed": 3}, []
        )
        expected = Path("runs/paper-bf-zoo-resnet18@cifar100-resnet18@mnist-s3")
        assert commands.default_out(made) == expected

    @pytest.mark.parametrize("text", ["", "a", "0,,1", "-1", "1,1"])
    def test_bad_seeds(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--seeds"):
            commands.parse_seeds(text)

    def test_pretrain(self) -> None:
        from kiop_fast.pretrain import RECIPES

        made = commands.pretrain_config("digits", {"arch": "resnet20", "epochs": None}, ["lr=0.2"])
        assert (made.arch, made.data, made.lr) == ("resnet20", "digits", 0.2)
        assert made.epochs == RECIPES["digits"]["epochs"]


class TestTrain:
    def test_flags_arrive(self, trained: list[Any], tmp_path: Path) -> None:
        done = run(
            "train", "storing.lr=2", "prompt.rings=[18, 24, 30]", "--preset", "demo",
            "--target", "x@letters", "--provider", "y@digits", "--provider", "z@shapes",
            "--engine", "reference", "--seed", 4, "--epochs", 3, "--threads", 1,
            "--device", "cpu", "--out", tmp_path / "r", "--resume",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        ((config, out, resume),) = trained
        assert (out, resume) == (tmp_path / "r", True)
        assert (config.target, config.providers) == ("x@letters", ("y@digits", "z@shapes"))
        assert (config.engine, config.seed, config.epochs) == ("reference", 4, 3)
        assert (config.threads, config.device, config.storing.lr) == (1, "cpu", 2.0)
        assert config.prompt.rings == (18, 24, 30)
        for word in ("90.0 %", "25.0 %", "index.html"):
            assert word in done.output

    def test_seeds_and_their_mean(self, trained: list[Any], tmp_path: Path) -> None:
        done = run("train", "--seeds", "0,1,2", "--out", tmp_path)
        assert done.exit_code == 0, done.output
        assert [(c.seed, o) for c, o, _ in trained] == [
            (seed, tmp_path / f"seed-{seed}") for seed in (0, 1, 2)
        ]
        assert "60.0 ± 10.0 %" in done.output  # of 50, 60 and 70 %
        assert "25.0 ± 0.0 %" in done.output

    def test_json(self, trained: list[Any], tmp_path: Path) -> None:
        done = run("train", "--json", "--out", tmp_path / "r")
        (facts,) = json.loads(done.stdout)
        assert facts["accuracy"] == {"letters": 0.5, "digits": 0.25}
        assert facts["artefact"] is None

    def test_ctrl_c_names_the_command_that_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def stop(*arguments: object, **settings: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, "train", stop)
        done = run("train", "storing.lr=0.5", "--out", tmp_path / "a run")
        assert done.exit_code == 130
        expected = f"kiop-fast train storing.lr=0.5 --out '{tmp_path}/a run' --resume"
        assert expected in done.stderr
        again = run("train", "--resume", "--out", tmp_path / "run")
        assert again.stderr.count("--resume") == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["train", "--preset", "dmeo"], "did you mean demo"),
            (["train", "storing.stepps=3"], "did you mean storing.steps"),
            (["train", "storing.lr"], "key=value"),
            (["train", "--mode", "bff"], "did you mean bf"),
            (["train", "--engine", "fst"], "did you mean fast"),
            (["train", "--config", "nothing.toml"], "no such config file"),
            (["train", "--seeds", "0;1"], "--seeds"),
            (["train", "prompt.rings=[20, 18]"], "grow outwards"),
            (["presets", "paper"], "did you mean paper-"),
            (["pretrain", "--data", "letter", "--arch", "resnet8"], "did you mean letters"),
            (["pretrain", "rate=3"], "unknown setting 'rate'"),
            (["info", "nothing.safetensors"], "no such prompt file"),
            (["report", "nothing"], "no run folder"),
        ],
    )
    def test_one_message_and_exit_2(self, arguments: list[str], words: str) -> None:
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.output

    def test_a_damaged_artefact(self, folder: Path) -> None:
        path = folder / "prompt.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        for command in ("info", "evaluate"):
            done = run(command, folder)
            assert done.exit_code == 2
            assert "damaged" in done.stderr

    def test_an_unreadable_image(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"?")
        done = run("predict", folder, tmp_path / "bad.png")
        assert done.exit_code == 2
        assert "bad.png" in done.stderr


class TestDelivery:
    def test_evaluate(self, folder: Path) -> None:
        done = run("evaluate", folder, "--json")
        found = json.loads(done.stdout)
        assert json.loads((folder / "evaluation.json").read_text()) == found
        assert found["tasks"]["digits"]["floor"] is not None
        assert found["tasks"]["digits"]["ceiling"] is not None
        table = run("evaluate", folder / "prompt.safetensors")
        assert table.exit_code == 0, table.output
        assert f"{100 * found['tasks']['letters']['accuracy']:.1f}" in table.output

    def test_a_provider_of_another_job(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target, other = tiny_sources().target, tiny_source("c", 10, seed=3).model
        info = replace(dataset("digits").info, name="shapes", classes=tuple("abcdefghij"))
        wrong = freeze(other, info, name="tiny@shapes", arch="tiny")
        monkeypatch.setattr("kiop_fast.sources.load_sources", lambda *a: Sources(target, (wrong,)))
        done = run("evaluate", folder, "--provider", "tiny@shapes")
        assert done.exit_code == 2
        assert "tiny@shapes does not do task 'digits'" in done.stderr
        assert not (folder / "evaluation.json").exists()

    def test_predict(self, folder: Path, tmp_path: Path) -> None:
        Image.new("L", (9, 9), 200).save(tmp_path / "a.png")
        done = run("predict", folder, tmp_path / "a.png", "--task", "digits", "--top", 2, "--json")
        (said,) = json.loads(done.stdout)
        assert said["task"] == "digits"
        assert len(said["best"]) == 2
        assert run("predict", folder, tmp_path / "a.png").exit_code == 0

    def test_report(self, folder: Path) -> None:
        done = run("report", folder)
        assert done.exit_code == 0, done.output
        assert (folder / "report" / "gradcam.png").exists()

    def test_info(self, folder: Path) -> None:
        said = run("info", folder).output
        words = ("tiny@letters", "16 → 20 → 32", f"{2 * 3 * (32**2 - 16**2):,} bytes",
                 "0←D", "25.0 %", "running")  # fmt: skip
        for word in words:
            assert word in said

    def test_presets(self) -> None:
        listed = tomllib.loads(re.sub(r"^# preset (\S+)", r"[x]", run("presets", "demo").stdout))
        assert from_dict(RunConfig, listed) == preset("demo")
        said = run("presets").stdout
        assert all(f"# preset {name}\n" in said for name in PRESETS)


def test_help_is_quick_and_heavy_imports_wait() -> None:
    program = (
        "import sys; from kiop_fast.cli import app; import kiop_fast;"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    program = "import sys, kiop_fast.run; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    checkout = Path(kiop_fast.__file__).parent.parent / "cli.py"
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, checkout, "--help"], check=True, capture_output=True, text=True
        )
        spent.append(time.perf_counter() - began)
    assert "pretrain" in done.stdout
    assert min(spent) < 2, "measured 0.3 s alone on one core; the rest is a crowded machine's"


def test_public_names() -> None:
    for name in kiop_fast.__all__:
        assert getattr(kiop_fast, name) is not None
    assert 8 <= len(kiop_fast.__all__) <= 14
    with pytest.raises(AttributeError, match="no attribute"):
        _ = kiop_fast.nothing
