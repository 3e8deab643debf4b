"""Source models: the zoo, how a source is written, and every file that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kiop_fast.data import dataset
from kiop_fast.errors import DataError, SourceError
from kiop_fast.source import (
    SourceSpec,
    build,
    fingerprint,
    load_source,
    names,
    parse_source,
    save_source,
    zoo,
)

CPU = torch.device("cpu")


# --- the zoo -----------------------------------------------------------------------------------


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_count(blocks: int, classes: int) -> int:
    """Convolutions 9·in·out, two numbers a BatchNorm channel, 1x1 shortcuts with BatchNorm."""
    total, inside = 27 * 16 + 32, 16
    for outside in (16, 32, 64):
        for _ in range(blocks):
            total += 9 * inside * outside + 9 * outside**2 + 4 * outside
            total += inside * outside + 2 * outside if inside != outside else 0
            inside = outside
    return total + 64 * classes + classes


def wide_count(depth: int, width: int, classes: int) -> int:
    """Pre-activation blocks: BatchNorm of the input and of the middle; bare 1x1 shortcuts."""
    total, inside = 27 * 16, 16
    for outside in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 2 * inside + 9 * inside * outside + 2 * outside + 9 * outside**2
            total += inside * outside if inside != outside else 0
            inside = outside
    return total + 2 * inside + inside * classes + classes


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("resnet8", resnet_count(1, 10)),
        ("resnet20", 272_474),  # He et al.'s 269,722 plus two 1x1 shortcuts with BatchNorm
        ("resnet20", resnet_count(3, 10)),
        ("wrn_16_1", wide_count(16, 1, 10)),
        ("wrn_40_2", 2_243_546),  # as published for WRN-40-2
        ("wrn_40_2", wide_count(40, 2, 10)),
        ("resnet18", 11_181_642),  # torchvision: 11,689,512 less 513,000 plus 5,130
    ],
)
def test_parameter_counts(arch: str, count: int) -> None:
    assert parameters(build(arch, 10, 32)) == count


@pytest.mark.parametrize("arch", ["resnet8", "resnet20", "wrn_16_1", "wrn_40_2"])
@pytest.mark.parametrize("side", [8, 15, 36])
def test_small_nets_take_any_canvas(arch: str, side: int) -> None:
    model = build(arch, 43, [8, side]).eval()
    assert model(torch.rand(1, 3, side, side)).shape == (1, 43)


@pytest.mark.parametrize(
    "arch", ["resnet50", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet"]
)
def test_torchvision_classifiers_with_a_new_head(arch: str) -> None:
    model = build(arch, 7, [32, 40]).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_upstream_architecture_has_upstreams_keys() -> None:
    with torch.device("meta"):
        keys = zoo._make("vgg13_bn", 10).state_dict()
    assert keys["classifier.6.weight"].shape == (10, 4096)


def test_names_hold_both_families() -> None:
    assert {"resnet8", "wrn_40_2", "resnet18", "resnet50", "resnet101", "vgg13_bn"} <= set(names())


@pytest.mark.parametrize(
    ("arch", "sides", "reason"),
    [
        ("inception_v3", 32, "Kernel size"),
        ("vit_b_16", 32, "Wrong image height"),
        ("vgg13_bn", [32, 16], "images of 16 pixels"),
        ("maxvit_t", 32, "RuntimeError"),
    ],
)
def test_models_that_do_not_take_the_side(arch: str, sides: int | list[int], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        build(arch, 10, sides)


def test_unknown_architecture_names_close_matches() -> None:
    with pytest.raises(SourceError, match=r"did you mean .*resnet18"):
        build("resnet19", 10, 32)


@pytest.mark.parametrize("arch", ["resnet8", "resnet18"])
def test_initial_weights_come_from_the_seed_alone(arch: str) -> None:
    torch.manual_seed(5)
    first, state = fingerprint(build(arch, 10, 32, seed=3)), torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert fingerprint(build(arch, 10, 32, seed=3)) == first
    assert fingerprint(build(arch, 10, 32, seed=4)) != first


# --- how a source is written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("resnet8", SourceSpec("zoo", "resnet8")),
        ("resnet8@letters", SourceSpec("zoo", "resnet8", "letters")),
        ("zoo:resnet8@letters", SourceSpec("zoo", "resnet8", "letters")),
        ("resnet18@cifar100=m.pth", SourceSpec("zoo", "resnet18", "cifar100", Path("m.pth"))),
        ("resnet18=a@b=c:d", SourceSpec("zoo", "resnet18", "", Path("a@b=c:d"))),
        ("resnet8@folder:pets", SourceSpec("zoo", "resnet8", "folder:pets")),
        ("python:my.mod:build@digits", SourceSpec("python", "my.mod:build", "digits")),
        ("python:m:b@d=w.pt", SourceSpec("python", "m:b", "d", Path("w.pt"))),
    ],
)
def test_parse(text: str, spec: SourceSpec) -> None:
    assert parse_source(text) == spec
    assert parse_source(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not written rightly"),
        ("@letters", "not written rightly"),
        ("resnet8@", "not written rightly"),
        ("resnet8@letters=", "not written rightly"),
        ("zo:resnet8", "did you mean zoo"),
        ("resnet9@letters", "did you mean"),
        ("python:module@digits", "names a module and a function"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(text)


# --- models from Python ------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, classes)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))

def build(classes):
    return Net(classes)

def ten():
    return Net(10)

def broken():
    raise ValueError("no such luck")

def text():
    return "model"
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


@pytest.mark.parametrize("function", ["build", "ten"])
def test_python_scheme(own_module: str, function: str) -> None:
    before = list(sys.path)
    spec = parse_source(f"python:{own_module}:{function}@digits")
    source = load_source(spec, sides=[16, 20], device=CPU)
    assert source.classes == 10
    assert source.name == f"{own_module}:{function}@digits"
    assert not any(p.requires_grad for p in source.model.parameters())
    assert sys.path == before


def test_python_scheme_with_weights(own_module: str, tmp_path: Path) -> None:
    spec = parse_source(f"python:{own_module}:ten@digits")
    given = load_source(spec, sides=[16], device=CPU)
    torch.save(given.model.state_dict(), "own.pt")
    again = load_source(parse_source(f"{spec}=own.pt"), sides=[16], device=CPU)
    assert again.sha256 == given.sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:nothing", "has no function 'nothing'"),
        ("no_such_module:build", "cannot be imported"),
        ("own_models:broken", "no such luck"),
        ("own_models:text", "made no model"),
    ],
)
def test_python_scheme_refuses(own_module: str, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_source(parse_source(f"python:{name}@digits"), sides=[16], device=CPU)


def test_python_model_of_another_class_count(own_module: str) -> None:
    with pytest.raises(SourceError, match=r"output \(2, 10\)"):
        load_source(parse_source("python:own_models:ten@letters"), sides=[16], device=CPU)


# --- files -------------------------------------------------------------------------------------


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
