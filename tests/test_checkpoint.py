"""Files of source models: round trips, and every file that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from kiop_fast.data import dataset
from kiop_fast.errors import DataError, SourceError
from kiop_fast.source import (
    build,
    fingerprint,
    load_source,
    parse_source,
    save_source,
)

CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Module:
    return build("resnet8", 10, 16, seed=1)


@pytest.fixture
def saved(tmp_path: Path, model: nn.Module) -> Path:
    info = dataset("digits").info
    return save_source(tmp_path / "m.safetensors", model, arch="resnet8", info=info, side=16,
                       accuracy=0.875, extra={"note": "x"})  # fmt: skip


def load(text: str, path: Path | None = None) -> object:
    spec = parse_source(text + (f"={path}" if path else ""))
    return load_source(spec, sides=[16], device=CPU)


@pytest.mark.parametrize("text", ["resnet8", "resnet8@digits"])
def test_round_trip(saved: Path, model: nn.Module, text: str) -> None:
    source = load_source(parse_source(f"{text}={saved}"), sides=[16, 20, 32], device=CPU)
    assert source.sha256 == fingerprint(model)
    assert source.info == dataset("digits").info
    assert (source.name, source.arch, source.accuracy) == ("resnet8@digits", "resnet8", 0.875)
    assert not source.model.training
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("name", ["m.pth", "ResNet18_cifar10", "m.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_state_dict(tmp_path: Path, model: nn.Module, name: str, zipped: bool) -> None:
    torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    source = load("resnet8@digits", tmp_path / name)
    assert source.sha256 == fingerprint(model)
    assert source.accuracy is None


def test_old_files_without_batch_counts(tmp_path: Path, model: nn.Module) -> None:
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pth")
    load("resnet8@digits", tmp_path / "old.pth")


def test_no_data_known(tmp_path: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(SourceError, match=r"data of source .* is not known"):
        load("resnet8", tmp_path / "m.pth")
    with pytest.raises(DataError, match="unknown dataset"):
        load("resnet8@digit", tmp_path / "m.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.pth"):
        load("resnet8@digits", tmp_path / "nowhere.pth")


def test_no_path_and_nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIOP_FAST_CACHE", str(tmp_path))
    for text in ("resnet8@digits", "resnet18@cifar100", "resnet8"):
        with pytest.raises(SourceError, match="kiop-fast pretrain --arch resnet"):
            load(text)


def test_other_class_count_names_both(tmp_path: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(SourceError, match=r"10 classes in the file(.|\n)*26 classes"):
        load("resnet8@letters", tmp_path / "m.pth")


def test_other_architecture(tmp_path: Path, model: nn.Module, saved: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(SourceError, match=r"missing .* and .* more; extra .*; wrong shape"):
        load("wrn_16_1@digits", tmp_path / "m.pth")
    with pytest.raises(SourceError, match=r"holds another architecture(.|\n)*resnet8"):
        load("resnet20@digits", saved)


def test_other_data_than_in_the_header(saved: Path) -> None:
    with pytest.raises(SourceError, match=r"trained on other data(.|\n)*digits(.|\n)*letters"):
        load("resnet8@letters", saved)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "old.pth"])
@pytest.mark.parametrize("keep", [0, 5, 300, -1000])
def test_truncated(tmp_path: Path, saved: Path, model: nn.Module, name: str, keep: int) -> None:
    path = tmp_path / name
    if name != saved.name:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=name == "m.pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=f"weights in {name} cannot be read"):
        load("resnet8@digits", path)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {os.environ['KIOP_TEST_MARK']}",)


@pytest.mark.parametrize("plain", [True, False])
def test_malicious_pickle_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setenv("KIOP_TEST_MARK", str(mark))
    path = tmp_path / "bomb.pth"
    if plain:
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"weight": Bomb()}, path)
    with pytest.raises(SourceError, match=r"no plain state dict|cannot be read"):
        load("resnet8@digits", path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {"state_dict": {"a": torch.zeros(2)}, "epoch": 3},
        {},
        {1: torch.zeros(2)},
        torch.zeros(3),
    ],
)
def test_no_plain_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(SourceError, match="no plain state dict"):
        load("resnet8@digits", tmp_path / "m.pth")


def test_whole_models_are_refused(tmp_path: Path, model: nn.Module) -> None:
    torch.save(model, tmp_path / "m.pth")
    with pytest.raises(SourceError, match="no plain state dict"):
        load("resnet8@digits", tmp_path / "m.pth")


def test_weights_that_are_not_finite(tmp_path: Path, model: nn.Module) -> None:
    state = model.state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(SourceError, match=r"not finite(.|\n)*fc\.bias"):
        load("resnet8@digits", tmp_path / "m.pth")


def _edit_header(path: Path, **changes: object) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["kiop_fast"])
    for key, value in changes.items():
        facts.pop(key) if value is None else facts.update({key: value})
    header["__metadata__"]["kiop_fast"] = json.dumps(facts)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "another format version"),
        ({"data": None}, "header .* is damaged"),
        ({"data": {"name": "digits"}}, "header .* is damaged"),
        ({"sha256": "0" * 64}, "changed after it was saved"),
    ],
)
def test_damaged_header(saved: Path, changes: dict[str, object], message: str) -> None:
    _edit_header(saved, **changes)
    with pytest.raises(SourceError, match=message):
        load("resnet8@digits", saved)


def test_flipped_bit_in_the_weights(saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-2] ^= 1
    saved.write_bytes(raw)
    with pytest.raises(SourceError, match="changed after it was saved"):
        load("resnet8@digits", saved)


def test_plain_safetensors_of_another_program(tmp_path: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert load("resnet8@digits", tmp_path / "m.safetensors").sha256 == fingerprint(model)
