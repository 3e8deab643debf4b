"""Whole runs, small: every preset, exactness, several providers, data-freedom."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny

from kiop_fast import data
from kiop_fast.config_io import override
from kiop_fast.errors import ConfigError, MappingError, NonFiniteLossError, RunError, SourceError
from kiop_fast.pipeline import train
from kiop_fast.presets import PRESETS, preset
from kiop_fast.prompt.artefact import load_prompt
from kiop_fast.source import Source, freeze
from kiop_fast.sources import Sources

Make = Callable[..., Source]


@pytest.fixture
def sources(make_source: Make) -> Sources:
    return Sources(make_source("resnet8", "letters"), (make_source("resnet8", "digits"),))


def cells_of(path: Path) -> list[torch.Tensor]:
    return load_prompt(path / "prompt.safetensors").cells


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("name", PRESETS)
def test_two_steps_of_every_preset(
    name: str, engine: str, make_source: Make, tmp_path: Path
) -> None:
    config = preset(name)
    small = {"epochs": 1, "engine": engine, "device": "cpu", "evaluation": {"every": 0},
             "prompt": {"calibration_batch": 4, "calibration_images": 8},
             "synthesis": {"batch": 4, "steps": 2, "width": 4, "latent": 8, "head_width": 8},
             "storing": {"steps": 2, "batch": 4, "batch_real": 4}}  # fmt: skip
    config = override(config, small)
    data_of = {"cifar100": "letters", "mnist": "digits", "fmnist": "shapes"}
    names = [spec.partition("@")[2] for spec in (config.target, *config.providers)]
    target, *providers = [make_source("resnet8", data_of.get(n, n), config.side) for n in names]
    result = train(config, tmp_path / "run", sources=Sources(target, tuple(providers)))
    assert len(result.metrics) == 1
    if config.mode == "vanilla":
        assert result.artefact is None
        assert (tmp_path / "run" / "student.safetensors").exists()
    else:
        moved = [bool(cells.any()) for cells in cells_of(tmp_path / "run")]
        assert all(moved), "every ring of every preset is trained"


def test_the_same_seed_gives_the_same_bytes(sources: Sources, tmp_path: Path) -> None:
    config = tiny(evaluation={"every": 1})
    for name in ("first", "second"):
        train(config, tmp_path / name, sources=sources)
    first, second = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("first", "second"))
    assert first == second
    assert same(cells_of(tmp_path / "first"), cells_of(tmp_path / "second"))
    train(override(config, {"seed": 1}), tmp_path / "third", sources=sources)
    assert not same(cells_of(tmp_path / "first"), cells_of(tmp_path / "third"))


@pytest.mark.parametrize(("mode", "start"), [("bf", "fresh"), ("bf", "meta"), ("vanilla", "fresh")])
def test_stop_and_resume_at_an_epoch_changes_nothing(
    mode: str, start: str, sources: Sources, tmp_path: Path
) -> None:
    synthesis = {"bank_rows": 24, "start": start, "meta_steps": 2}
    prompt = {"mapping": "likelihood", "mapping_steps": 2} if start == "meta" else {}
    config = tiny(epochs=3, mode=mode, synthesis=synthesis, prompt=prompt)
    train(config, tmp_path / "whole", sources=sources)

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int, **values: float) -> None:
        if stage.startswith("epoch 2/3") and "store" in stage:
            raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "halved", sources=sources, progress=stop)
    result = train(config, tmp_path / "halved", sources=sources, resume=True)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert (whole / "metrics.jsonl").read_bytes() == (halved / "metrics.jsonl").read_bytes()
    name = "student.safetensors" if mode == "vanilla" else "prompt.safetensors"
    assert (whole / name).read_bytes() == (halved / name).read_bytes()
    assert [record["epoch"] for record in result.metrics] == [1, 2, 3]


def test_three_providers_and_rings_of_choice(make_source: Make, tmp_path: Path) -> None:
    many = Sources(
        make_source("resnet8", "letters"),
        (
            make_source("resnet8", "digits"),
            make_source("resnet8", "shapes"),
            make_source("resnet20", "digits"),
        ),
    )
    config = tiny(
        providers=["resnet8@digits", "resnet8@shapes", "resnet20@digits"],
        prompt={"rings": [18, 23, 27, 32]},
        evaluation={"every": 2},
    )
    result = train(config, tmp_path / "run", sources=many)
    assert list(result.accuracy) == ["letters", "digits", "shapes", "digits-2"]
    artefact = load_prompt(tmp_path / "run" / "prompt.safetensors")
    assert [task.depth for task in artefact.tasks] == [1, 2, 3, 4]
    assert [c.shape[1] for c in artefact.cells] == [
        18**2 - 16**2, 23**2 - 18**2, 27**2 - 23**2, 32**2 - 27**2,
    ]  # fmt: skip


def test_data_free(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every reader of real data poisoned, mode bf makes the same prompt, bit for bit."""
    train(tiny(evaluation={"every": 1}), tmp_path / "open", sources=sources)

    def poisoned(*arguments: object) -> object:
        raise AssertionError("real data was read")

    for name in data.known():
        known = data.dataset(name)
        monkeypatch.setitem(
            data.registry._DATASETS, name, data.Dataset(known.info, poisoned, poisoned)
        )
    train(tiny(), tmp_path / "sealed", sources=sources)
    assert same(cells_of(tmp_path / "open"), cells_of(tmp_path / "sealed"))
    opened = load_prompt(tmp_path / "open" / "prompt.safetensors")
    sealed = load_prompt(tmp_path / "sealed" / "prompt.safetensors")
    for left, right in zip(opened.tasks, sealed.tasks, strict=True):
        assert left.mapping is None or torch.equal(left.mapping, right.mapping)
        for name, value in (left.statistics or {}).items():
            assert torch.equal(value, right.statistics[name])
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("open", "sealed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode", ["bf", "b", "t", "vanilla"])
@pytest.mark.parametrize("policy", ["batch", "running", "calibrated"])
def test_sources_are_frozen_for_good(
    mode: str, policy: str, sources: Sources, tmp_path: Path
) -> None:
    rings = [28] if mode == "t" else [20, 28]
    config = tiny(mode=mode, epochs=1, prompt={"rings": rings, "batchnorm": policy})
    before = sources.fingerprints()
    train(config, tmp_path / "run", sources=sources)
    assert before == sources.fingerprints()
    for source in (sources.target, *sources.providers):
        source.check_unchanged()
        assert all(p.grad is None and not p.requires_grad for p in source.model.parameters())


def test_a_touched_source_is_noticed(make_source: Make) -> None:
    import copy

    source = make_source("resnet8", "digits")
    model = copy.deepcopy(source.model)
    frozen = freeze(model, source.info, name="copy", arch="resnet8")
    model.train()
    model(torch.rand(4, 3, 16, 16))
    with pytest.raises(SourceError, match="frozen for good"):
        frozen.check_unchanged()


def test_banks_can_stop_growing(sources: Sources, tmp_path: Path) -> None:
    train(tiny(synthesis={"epochs": 1, "calls": 2}), tmp_path / "run", sources=sources)
    assert [p.name for p in (tmp_path / "run/banks/digits").iterdir()] == ["00000.safetensors"]
    train(tiny(synthesis={"epochs_of_a": 1}), tmp_path / "uneven", sources=sources)
    counts = {task: len(list((tmp_path / "uneven/banks" / task).iterdir()))
              for task in ("letters", "digits")}  # fmt: skip
    assert counts == {"letters": 1, "digits": 2}


class TestBadInput:
    def test_too_few_target_classes(self, make_source: Make, tmp_path: Path) -> None:
        turned = Sources(make_source("resnet8", "digits"), (make_source("resnet8", "letters"),))
        with pytest.raises(MappingError, match=r"(?s)10 classes.*26 classes.*swap"):
            train(tiny(), tmp_path / "run", sources=turned)

    def test_it_shows_before_any_long_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Too few classes and an occupied folder are refused before a source is trained."""
        monkeypatch.setenv("KIOP_FAST_CACHE", str(tmp_path / "cache"))
        turned = tiny(target="resnet8@digits", providers=["resnet8@letters"])
        with pytest.raises(MappingError, match=r"(?s)10 classes.*26 classes"):
            train(turned, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.toml").write_text("")
        with pytest.raises(RunError, match="already holds a run"):
            train(tiny(), tmp_path / "run")
        assert not (tmp_path / "cache").exists()

    def test_no_batchnorm(self, sources: Sources, tmp_path: Path) -> None:
        plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 10))
        info = sources.providers[0].info
        bare = Sources(sources.target, (freeze(plain, info, name="plain", arch="mlp"),))
        with pytest.raises(SourceError, match="BatchNorm"):
            train(tiny(), tmp_path / "run", sources=bare)

    @pytest.mark.parametrize("rings", [[20, 20], [28, 20], [16, 20], [12, 20], [20, 28, 32], []])
    def test_rings(self, rings: list[int]) -> None:
        with pytest.raises(ConfigError, match="ring"):
            tiny(prompt={"rings": rings})

    def test_another_run_in_the_folder(self, sources: Sources, tmp_path: Path) -> None:
        train(tiny(epochs=1), tmp_path / "run", sources=sources)
        with pytest.raises(RunError, match="already holds a run"):
            train(tiny(epochs=1), tmp_path / "run", sources=sources)
        with pytest.raises(RunError, match="other settings"):
            train(tiny(epochs=1, seed=5), tmp_path / "run", sources=sources, resume=True)

    def test_other_weights_on_resume(
        self, sources: Sources, make_source: Make, tmp_path: Path
    ) -> None:
        train(tiny(epochs=1), tmp_path / "run", sources=sources)
        other = Sources(sources.target, (make_source("resnet8", "digits", 16, 3),))
        with pytest.raises(RunError, match="provider 1"):
            train(tiny(epochs=1), tmp_path / "run", sources=other, resume=True)

    def test_a_loss_that_explodes(self, sources: Sources, tmp_path: Path) -> None:
        train(tiny(epochs=2), tmp_path / "fine", sources=sources)
        with pytest.raises(NonFiniteLossError, match=r"epoch 1, step \d+, term letters.kl"):
            train(tiny(storing={"lr": 1e38, "steps": 20}), tmp_path / "run", sources=sources)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"synthesis": {"stepps": 3}}, "synthesis.steps"),
            ({"mode": "bff"}, "bf"),
            ({"engine": "quick"}, "fast"),
            ({"epochs": 0}, "at least 1"),
            ({"side": 18}, "multiple of 4"),
            ({"storing": {"lr": "high"}}, "wrong type"),
            ({"synthesis": {"scale": [0.5]}}, "length"),
            ({"synthesis": {"start": "last"}}, "fresh, meta"),
            ({"synthesis": {"meta_steps": -1}}, "0 or more"),
            ({"synthesis": {"meta_rate": 0}}, "meta_rate"),
        ],
    )
    def test_settings(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            tiny(**change)

    def test_unknown_preset(self) -> None:
        with pytest.raises(ConfigError, match="paper-bf"):
            preset("paper-bff")
