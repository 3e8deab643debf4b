"""Whole runs on files: mode b, pretraining and evaluation read by DALI, on the CPU here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import pictures, write_cifar, write_folder, write_gtsrb
from PIL import Image
from typer.testing import CliRunner

from kiop_fast.cli import app
from kiop_fast.config import LoadingConfig, PretrainConfig, RunConfig
from kiop_fast.config_io import override
from kiop_fast.deliver.evaluate import source_accuracy
from kiop_fast.errors import ConfigError, DataError
from kiop_fast.pipeline import train
from kiop_fast.pretrain import pretrain
from kiop_fast.prompt.artefact import load_prompt
from kiop_fast.source import Source, load_source, parse_source
from kiop_fast.sources import Sources

pytest.importorskip("nvidia.dali")

Make = Callable[..., Source]

TINY: dict[str, Any] = {
    "side": 16, "epochs": 2, "threads": 1, "device": "cpu", "mode": "b",
    "prompt": {"rings": [20, 28], "calibration_batch": 16},
    "synthesis": {"batch": 12, "steps": 2, "width": 4, "latent": 8, "head_width": 8, "head_dim": 4,
                  "pad": 1},
    "storing": {"steps": 4, "batch": 8, "batch_real": 8, "lr": 1.0, "temperature": 4.0},
    "loading": {"threads": 1},
}  # fmt: skip


def tiny(target: str, **changes: Any) -> RunConfig:
    base = override(RunConfig(), {"target": target, "providers": ["resnet8@digits"]})
    return override(override(base, TINY), changes)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIOP_FAST_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def sources(make_source: Make) -> Callable[[str], Sources]:
    return lambda name: Sources(
        make_source("resnet8", name, 16), (make_source("resnet8", "digits", 16),)
    )


@pytest.fixture
def signs(root: Path) -> Path:
    images = [pictures(i + 1, 20 + i % 5 * 9, 25 + i, 3)[i] for i in range(30)]
    return write_gtsrb(root / "data", images, [i % 43 for i in range(30)])


def cells(path: Path) -> list[torch.Tensor]:
    return load_prompt(path / "prompt.safetensors").cells


def apart(left: Path, right: Path) -> float:
    return max((a - b).abs().max().item() for a, b in zip(cells(left), cells(right), strict=True))


def no_pillow(*arguments: object, **options: object) -> None:
    raise AssertionError("Pillow was asked to read a file")


def test_mode_b_on_pickled_batches(
    root: Path, sources: Callable[[str], Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's and the kernel's batches are the same pictures: the prompts agree."""
    images = pictures(50, 32, 32, 3)
    write_cifar(root / "data", monkeypatch, images, [i % 10 for i in range(50)])
    models = sources("cifar10")
    for loader in ("dali", "torch", "auto"):
        config = tiny("resnet8@cifar10", loading={"loader": loader})
        result = train(config, root / loader, sources=models)
        assert set(result.accuracy) == {"cifar10", "digits"}
        assert not (root / loader / "banks" / "cifar10").exists()
    assert all(bool(ring.any()) for ring in cells(root / "dali"))
    assert apart(root / "dali", root / "torch") < 2e-3  # fp16 cells, eight SGD steps
    assert apart(root / "dali", root / "auto") == 0


def test_mode_b_on_ppm_files(
    root: Path, signs: Path, sources: Callable[[str], Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded once or for every batch, by DALI alone, stopped and resumed: the same prompt."""
    models = sources("gtsrb")
    monkeypatch.setattr(Image, "open", no_pillow)
    kept = tiny("resnet8@gtsrb", loading={"loader": "dali"})
    result = train(kept, root / "kept", sources=models)
    assert set(result.accuracy) == {"gtsrb", "digits"}
    anew = override(kept, {"loading": {"memory_gb": 0.0}})
    train(anew, root / "anew", sources=models)
    assert apart(root / "kept", root / "anew") < 2e-3

    def stop(stage: str, done: int, total: int, **values: float) -> None:
        if stage.startswith("epoch 2/2") and "store" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(anew, root / "halved", sources=models, progress=stop)
    train(anew, root / "halved", sources=models, resume=True)
    whole, halved = ((root / n / "metrics.jsonl").read_bytes() for n in ("anew", "halved"))
    assert whole == halved
    assert apart(root / "anew", root / "halved") == 0


def test_synthetic_banks_through_dali(root: Path, sources: Callable[[str], Sources]) -> None:
    """``storing.replay=dali`` shows what the kernel shows, crops and flips included."""
    models = sources("letters")
    augment = {"augment_as_dataset": False, "pad": 2, "flip": 0.5}
    for replay in ("kernel", "dali"):
        config = tiny("resnet8@letters", mode="bf", storing={**augment, "replay": replay})
        train(config, root / replay, sources=models)
    assert apart(root / "kernel", root / "dali") < 2e-3
    with pytest.raises(ConfigError, match="reads PNGs back"):
        tiny("resnet8@letters", engine="reference", storing={"replay": "dali"})


def test_pretrain_and_evaluate_through_dali(root: Path) -> None:
    """Two colours are told apart, from files, by either loader, to nearly the same weights."""
    rng = np.random.default_rng(0)
    files: dict[str, list[tuple[str, np.ndarray]]] = {"blue": [], "red": []}
    for i in range(40):
        pixels = rng.integers(0, 90, (18 + i % 3, 20, 3), dtype=np.uint8)
        name = ("red", "blue")[i % 2]
        pixels[..., (0, 2)[i % 2]] += 140
        files[name].append((f"{i}.{('png', 'jpg', 'ppm')[i % 3]}", pixels))
    write_folder(root / "colours", files)
    (root / "colours" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data = f"folder:{root / 'colours'}"
    settings = {"arch": "resnet8", "data": data, "side": 16, "epochs": 4, "batch": 8, "lr": 0.05}
    with pytest.raises(DataError, match=r"broken\.png"):
        pretrain(PretrainConfig(**settings), root / "x.safetensors")
    paths = {}
    for loader in ("dali", "torch"):
        loading = LoadingConfig(loader=loader, undecodable="skip", threads=1)
        config = PretrainConfig(**settings, loading=loading)
        with pytest.warns(UserWarning, match=r"skipped 1 .*broken\.png"):
            paths[loader] = pretrain(config, root / f"{loader}.safetensors")
    made = [
        load_source(parse_source(f"resnet8={path}"), sides=[16], device=torch.device("cpu"))
        for path in paths.values()
    ]
    assert [source.accuracy for source in made] == [1.0, 1.0]
    assert made[0].info.classes == ("blue", "red")
    skip = LoadingConfig(loader="dali", undecodable="skip", threads=1)
    assert source_accuracy(made[1], 16, 5, skip) == 1.0


def test_missing_test_data_stop_a_run_before_it_starts(
    root: Path, sources: Callable[[str], Sources]
) -> None:
    config = tiny("resnet8@cifar100", mode="bf")
    with pytest.raises(DataError, match=r"'cifar100' cannot be read(.|\n)*evaluation\.every=0"):
        train(config, root / "run", sources=sources("cifar100"))
    assert not (root / "run" / "config.toml").exists()
    train(override(config, {"evaluation": {"every": 0}}), root / "run", sources=sources("cifar100"))


def test_dali_is_asked_for_before_a_run_starts(
    root: Path, sources: Callable[[str], Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiop_fast.data.dali.available", lambda: False)
    for change in ({"loading": {"loader": "dali"}}, {"storing": {"replay": "dali"}}):
        with pytest.raises(DataError, match=r"not installed(.|\n)*pip install nvidia-dali"):
            train(tiny("resnet8@letters", mode="bf", **change), root / "run",
                  sources=sources("letters"))  # fmt: skip
    assert not (root / "run" / "config.toml").exists()


def test_the_flag_of_the_command_line(root: Path, signs: Path) -> None:
    run = CliRunner()
    weights = root / "signs.safetensors"
    common = ["epochs=1", "batch=8", "loading.threads=1", "--side", "16", "--quiet"]
    done = run.invoke(app, ["pretrain", "--data", "gtsrb", "--loader", "dali", *common,
                            "--arch", "resnet8", "--out", str(weights)])  # fmt: skip
    assert done.exit_code == 0, done.output
    arguments = ["train", "--preset", "paper-b", "--target", f"resnet8@gtsrb={weights}",
                 "--provider", f"resnet8@gtsrb={weights}", "--loader", "dali", "--side", "16",
                 "--epochs", "1", "--device", "cpu", "--out", str(root / "run"), "--quiet",
                 "prompt.rings=[20, 24]", "synthesis.steps=2", "synthesis.batch=4",
                 "synthesis.width=4", "synthesis.head_width=8", "synthesis.pad=1",
                 "storing.steps=2", "storing.batch=4", "storing.batch_real=4"]  # fmt: skip
    done = run.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for loader in ("dali", "torch"):
        again = run.invoke(app, ["evaluate", str(root / "run"), "--loader", loader, "--json"])
        assert again.exit_code == 0, again.output
    wrong = run.invoke(app, ["pretrain", "--data", "gtsrb", "--loader", "dahli"])
    assert wrong.exit_code == 2
    assert "did you mean dali" in wrong.output
