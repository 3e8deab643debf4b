"""How a source is written, and models from the user's own Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kiop_fast.errors import SourceError
from kiop_fast.source import (
    SourceSpec,
    load_source,
    parse_source,
)

CPU = torch.device("cpu")


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
