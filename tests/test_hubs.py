"""Sources as people keep them: timm, torchvision, hub folders, wrapped keys, the authors' names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kiop_fast.config import PretrainConfig, RunConfig
from kiop_fast.config_io import override
from kiop_fast.data import dataset
from kiop_fast.errors import SourceError
from kiop_fast.pipeline import train
from kiop_fast.pretrain import pretrain
from kiop_fast.prompt.artefact import load_prompt
from kiop_fast.source import (
    Source,
    SourceSpec,
    build,
    fingerprint,
    load_source,
    parse_source,
)
from kiop_fast.source.hubs import build_timm
from kiop_fast.sources import Sources

timm = pytest.importorskip("timm")

CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what timm's resnet10t was trained with


def load(text: str, *sides: int) -> Source:
    return load_source(parse_source(text), sides=sides or (32,), device=CPU)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("timm:resnet10t@folder:pets", SourceSpec("timm", "resnet10t", "folder:pets")),
        ("torchvision:resnet18=w.pth", SourceSpec("torchvision", "resnet18", "", Path("w.pth"))),
        ("hf-hub:timm/resnet10t.c3_in1k", SourceSpec("hf-hub", "timm/resnet10t.c3_in1k")),
        (
            "ResNet18_cifar10",
            SourceSpec("zoo", "resnet18", "cifar10", Path("ResNet18_cifar10")),
        ),
        (
            "weights/ResNet50_32_mnist",
            SourceSpec("zoo", "resnet50", "mnist", Path("weights/ResNet50_32_mnist")),
        ),
        (
            "vgg13_bn_cifar100=x.pth",
            SourceSpec("zoo", "vgg13_bn", "cifar100", Path("x.pth")),
        ),
    ],
)
def test_how_sources_are_written(text: str, spec: SourceSpec) -> None:
    assert parse_source(text) == spec
    assert parse_source(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet10tt", "did you mean resnet10t"),
        ("torchvision:resnet19", "did you mean .*resnet18"),
        ("hf-hub:resnet18", "OWNER/REPO"),
    ],
)
def test_names_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(text)


def test_the_authors_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision model with its classifier replaced, its state dict under the scripts' name."""
    from torchvision import models

    monkeypatch.chdir(tmp_path)
    model = models.resnet18(weights=None)
    model.fc = nn.Linear(512, 10)
    for name, data in (("ResNet18_cifar10", "cifar10"), ("ResNet18_32_mnist", "mnist")):
        torch.save(model.state_dict(), name)
        source = load(name, 32, 36)
        assert source.sha256 == fingerprint(model.eval())
        assert source.info == dataset(data).info
        assert (source.name, source.arch) == (f"resnet18@{data}", "resnet18")
    with pytest.raises(SourceError, match=r"no such file(.|\n)*ResNet50_cifar10"):
        load("ResNet50_cifar10")


# --- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod.module."])
def test_wrapped_keys(tmp_path: Path, prefix: str, suffix: str) -> None:
    from safetensors.torch import save_file

    model = build("resnet8", 10, 16)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    assert load(f"resnet8@digits={path}", 16).sha256 == fingerprint(model)


def test_a_models_own_prefix_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped_models.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, classes))\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    given = load("python:wrapped_models:Net@digits", 16)
    torch.save(given.model.state_dict(), "w.pth")
    assert load("python:wrapped_models:Net@digits=w.pth", 16).sha256 == given.sha256


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = build("resnet8", 10, 16).state_dict()
    del state["bn.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["conv.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(SourceError) as caught:
        load(f"resnet8@digits={tmp_path / 'w.pth'}", 16)
    assert "missing bn.bias; extra extra.weight; wrong shape conv.weight" in str(caught.value)
    assert "(16, 1, 3, 3) instead of (16, 3, 3, 3)" in str(caught.value)


# --- timm ----------------------------------------------------------------------------------------


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    model = timm.create_model("resnet10t", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "t.pth")
    return tmp_path / "t.pth"


def test_timm_weights_with_a_dataset(timm_file: Path) -> None:
    source = load(f"timm:resnet10t@cifar10={timm_file}", 32, 36)
    assert source.info.classes == dataset("cifar10").info.classes
    assert (source.info.mean, source.info.std) == IMAGENET
    assert (source.name, source.arch) == ("resnet10t@cifar10", "timm:resnet10t")
    with pytest.raises(SourceError, match=r"10 classes in the file(.|\n)*43 classes"):
        load(f"timm:resnet10t@gtsrb={timm_file}")


def test_timm_weights_alone(timm_file: Path) -> None:
    """Classes counted in the file; normaliser and side from pretrained_cfg."""
    source = load(f"timm:resnet10t={timm_file}")
    assert source.info.classes == tuple(f"class {i}" for i in range(10))
    assert (source.info.name, source.info.side, source.info.channels) == ("resnet10t", 176, 3)
    assert (source.info.mean, source.info.std) == IMAGENET


def test_timm_files_without_a_classifier(timm_file: Path) -> None:
    state = {k: v for k, v in torch.load(timm_file).items() if not k.startswith("fc.")}
    torch.save(state, timm_file)
    with pytest.raises(SourceError, match=r"number of classes(.|\n)*fc\.weight"):
        load(f"timm:resnet10t={timm_file}")


def test_timm_models_can_be_trained(tmp_path: Path) -> None:
    config = PretrainConfig(arch="timm:test_resnet", data="digits", side=32, epochs=1, batch=64)
    path = pretrain(config, tmp_path / "m.safetensors")
    source = load(f"timm:test_resnet={path}", 32)
    assert source.info == dataset("digits").info  # of the header: trained with its normaliser
    with pytest.raises(SourceError, match=r"another architecture(.|\n)*timm:test_resnet"):
        load(f"resnet18={path}")
    with pytest.raises(SourceError, match="only architectures by name"):
        pretrain(PretrainConfig(arch="hf-hub:a/b", data="digits"), tmp_path / "x")


def test_a_fixed_input_size_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "v.pth")
    with pytest.raises(SourceError, match=r"images of 32 pixels(.|\n)*\(32\).*\(224\)"):
        load(f"timm:vit_tiny_patch16_224@cifar10={tmp_path / 'v.pth'}", 32)


def test_initial_weights_of_timm_come_from_the_seed() -> None:
    torch.manual_seed(1)
    first = fingerprint(build_timm("test_resnet", 3, seed=2))
    torch.manual_seed(2)
    assert fingerprint(build_timm("test_resnet", 3, seed=2)) == first
    assert fingerprint(build_timm("test_resnet", 3, seed=3)) != first


# --- folders and weights as the hubs keep them ---------------------------------------------------


def test_hub_folder(tmp_path: Path) -> None:
    """A repository as timm saves it, here on disk: facts from its config.json."""
    from timm.models import save_for_hf

    facts = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 64, 64)}
    model = timm.create_model("resnet10t", num_classes=3, pretrained_cfg_overlay=facts)
    names = {"num_classes": 3, "label_names": ["ant", "bee", "cat"]}
    save_for_hf(model, str(tmp_path / "repo"), model_config=names)
    source = load(f"hf-hub:{tmp_path / 'repo'}", 32, 40)
    assert source.sha256 == fingerprint(model.eval())
    assert (source.info.mean, source.info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (source.info.classes, source.info.side) == (("ant", "bee", "cat"), 64)
    with pytest.raises(SourceError, match=r"3 classes(.|\n)*10 classes"):
        load(f"hf-hub:{tmp_path / 'repo'}@cifar10")


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"cannot be fetched(.|\n)*config\.json"):
        load(f"hf-hub:{tmp_path / 'empty'}")


def test_torchvisions_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file lies in torch's cache, as after a download; facts are those of its weights."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = build("shufflenet_v2_x0_5", 1000, 32)
    name = Path(models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url).name
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    source = load("torchvision:shufflenet_v2_x0_5", 32)
    assert source.sha256 == fingerprint(model)
    assert source.info.classes[:2] == ("tench", "goldfish")
    assert (source.info.mean, source.info.std, source.info.side) == (*IMAGENET, 224)
    with pytest.raises(SourceError, match=r"1000 classes(.|\n)*10 classes"):
        load("torchvision:shufflenet_v2_x0_5@cifar10")


# --- whole runs ----------------------------------------------------------------------------------

SMALL = {
    "side": 32, "epochs": 1, "threads": 1, "device": "cpu", "evaluation": {"every": 0},
    "prompt": {"rings": [36, 40], "calibration_batch": 8},
    "synthesis": {"batch": 4, "steps": 2, "width": 4, "latent": 8, "head_width": 8, "head_dim": 4},
    "storing": {"steps": 2, "batch": 4, "lr": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param("vgg13_bn", marks=pytest.mark.slow), "resnet50", "wrn_16_1", "mobilenet_v2",
        "timm:mobilenetv3_small_050",
    ],
)  # fmt: skip
def test_whole_run(tmp_path: Path, arch: str) -> None:
    """From a file to a prompt that serves; only the projection head is narrower than usual."""
    scheme, _, name = arch.rpartition(":")
    model = build_timm(name, 43) if scheme else build(name, 43, 32)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    small = build("resnet8", 10, 32)
    torch.save(small.state_dict(), tmp_path / "b.pth")
    target = load(f"{arch}@gtsrb={tmp_path / 'a.pth'}", 32, 36, 40)
    provider = load(f"resnet8@digits={tmp_path / 'b.pth'}", 32)
    names = {"target": f"{arch}@gtsrb", "providers": ["resnet8@digits"]}
    config = override(RunConfig(), {**names, **SMALL})
    result = train(config, tmp_path / "run", sources=Sources(target, (provider,)))
    assert result.artefact is not None
    assert all(value == value for value in result.metrics[0]["loss"].values())
    artefact = load_prompt(result.artefact)
    assert all(bool(ring.any()) for ring in artefact.cells)
    assert artefact.target.arch == arch
    served = artefact.on(target)
    assert served.task("digits")(torch.rand(2, 1, 32, 32)).shape == (2, 10)
    assert served.task("gtsrb")(torch.rand(2, 3, 32, 32)).shape == (2, 43)


def test_a_run_of_models_without_data(tmp_path: Path, timm_file: Path) -> None:
    """Nothing to evaluate on; the prompt is trained all the same, tasks named by the models."""
    files = {"target": f"timm:resnet10t={timm_file}", "providers": [f"timm:resnet10t={timm_file}"]}
    config = override(RunConfig(), {**files, **SMALL, "evaluation": {"every": 1}})
    result = train(config, tmp_path / "run")
    assert result.accuracy == {}
    assert set(result.metrics[0]["agreement"]) == {"resnet10t", "resnet10t-2"}
