"""Settings: presets as published, TOML there and back, overrides that reach everything."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from kiop_fast.config import RunConfig, to_dict
from kiop_fast.config_io import dump_toml, from_dict, load_toml, merge, override, parse_overrides
from kiop_fast.errors import ConfigError
from kiop_fast.presets import PRESETS, preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# SPEC section 8: the flags of the authors' KiOP_BF.sh.
SCRIPT = {
    "epochs": 100, "seed": 0, "side": 32, "prompt.rings": (36, 128), "synthesis.batch": 64,
    "synthesis.steps": 200, "synthesis.lr": 0.01, "synthesis.bn": 1.0, "synthesis.oh": 1.0,
    "synthesis.adv": 0.5, "synthesis.cr": 0.8, "synthesis.cr_temperature": 0.6,
    "storing.steps": 400, "storing.batch": 64, "storing.lr": 0.8, "storing.temperature": 20.0,
    "storing.momentum": 0.9, "storing.weight_decay": 1e-4,
}  # fmt: skip


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def read(config: RunConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", ["paper-bf", "upstream"])
@pytest.mark.parametrize("key", SCRIPT)
def test_presets_carry_the_scripts_values(name: str, key: str) -> None:
    assert read(preset(name), key) == SCRIPT[key]


@pytest.mark.parametrize("name", PRESETS)
def test_toml_there_and_back(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "run.toml").write_text(dump_toml(config))
    assert from_dict(RunConfig, load_toml(tmp_path / "run.toml")) == config
    assert from_dict(RunConfig, tomllib.loads(dump_toml(config))).digest() == config.digest()


def test_an_override_reaches_every_setting() -> None:
    """Each setting in turn, changed to another valid value through key=value."""
    base = preset("demo")
    other = {
        "preset": "mine", "mode": "b", "engine": "reference", "device": "cpu",
        "target": "resnet20@letters", "prompt.mapping": "random", "prompt.extend": "file",
        "prompt.batchnorm": "running", "synthesis.normaliser": "provider",
        "synthesis.start": "fresh",
        "storing.target_of_a": "plain", "storing.target_of_b": "prompted",
        "providers": '["resnet8@shapes"]', "prompt.rings": "[24, 44]", "side": "20",
        "synthesis.scale": "[0.4, 0.9]", "synthesis.ratio": "[0.9, 1.1]",
        "precision": "bf16",
        "storing.replay": "dali", "loading.loader": "torch",
        "loading.undecodable": "skip",
    }  # fmt: skip
    if base.prompt.batchnorm == "running":
        other["prompt.batchnorm"] = "batch"
    for key, value in flat(to_dict(base)).items():
        if key in other:
            text = other[key]
        elif isinstance(value, bool):
            text = str(not value).lower()
        elif isinstance(value, int):
            text = str(value + 1)
        else:
            text = str(value * 0.5 + 0.01)
        changes = {key: text}
        if key == "side":
            changes["prompt.rings"] = "[24, 44]"
        if key == "prompt.disjoint":
            changes["prompt.mapping"] = "random"
        changed = override(base, parse_overrides(f"{k}={v}" for k, v in changes.items()))
        assert read(changed, key) != read(base, key), key
        decides = key != "offload"  # with it a run may go on that began without
        assert (changed.digest() != base.digest()) is decides, key


def test_overrides_parse_toml_or_text() -> None:
    parsed = parse_overrides(["storing.lr=0.5", "prompt.rings=[20, 32]", "mode=bf"])
    assert parsed == {"storing": {"lr": 0.5}, "prompt": {"rings": [20, 32]}, "mode": "bf"}


@pytest.mark.parametrize("text", ["storing.lr", "=3", ""])
def test_malformed_override(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides([text])


def test_unknown_key_names_the_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean synthesis\.steps"):
        from_dict(RunConfig, {"synthesis": {"stps": 3}})


@pytest.mark.parametrize("rule", ["frequency", "iterative", "likelihood"])
def test_only_random_mappings_can_be_disjoint(rule: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)disjoint.*{rule}.*mapping=random"):
        override(preset("upstream"), {"prompt": {"mapping": rule}})


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("demo").seed = 3  # type: ignore[misc]


def test_merge_is_deep_and_pure() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 5}}) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_missing_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_toml(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("a = ")
    with pytest.raises(ConfigError, match="no valid TOML"):
        load_toml(tmp_path / "broken.toml")
