"""Checkpoints of the scripts into prompt files and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import TinyNet, tiny_source, wave
from torch import Tensor, nn
from typer.testing import CliRunner
from upstream_files import write_gtsrb, write_mnist

from kiop_fast.cli import app
from kiop_fast.data import dataset
from kiop_fast.dropin.checkpoint import read_checkpoint
from kiop_fast.dropin.command import data_root
from kiop_fast.dropin.convert import (
    Replay,
    export_upstream,
    import_upstream,
    parse_mapping,
    remainder_path,
)
from kiop_fast.errors import ArtefactError, KiopError, MappingError
from kiop_fast.prompt.artefact import load_prompt, save_prompt
from kiop_fast.source import Source, freeze

MAPPING = torch.tensor([7, 3, 40, 0, 11, 42, 5, 9, 1, 30])


def target() -> Source:
    model = tiny_source("a", 43, seed=1).model
    return freeze(model, dataset("gtsrb").info, name="tiny@gtsrb", arch="tiny")


def ring(inner: int, outer: int, pace: float) -> dict[str, Tensor]:
    """A visual prompt's program and mask, made by hand: 1 on the border."""
    left, right = (outer - inner + 1) // 2, (outer - inner) // 2
    border = nn.functional.pad(torch.zeros(3, inner, inner), (left, right, left, right), value=1.0)
    return {"program": wave(3, outer, outer, pace=pace) * border, "mask": border}


def their_checkpoint(best: float = 10.0) -> dict[str, Any]:
    """What a script saves: drifted statistics, momentum, a schedule."""
    state = {f"modelA.{k}": v for k, v in ring(16, 20, 0.7).items()}
    state |= {f"modelD.{k}": v for k, v in ring(20, 27, 1.7).items()}
    drifted = {
        k: v + 0.25 if "running_mean" in k else v for k, v in target().model.state_dict().items()
    }
    state |= {f"modelB.{k}": v for k, v in drifted.items()}
    parameters = [nn.Parameter(v.clone()) for k, v in state.items() if k.endswith("program")]
    optimizer = torch.optim.SGD([*parameters, *TinyNet(43).parameters()], 0.8, momentum=0.9)
    for parameter in parameters:
        parameter.grad = wave(*parameter.shape, pace=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    optimizer.step()
    schedule.step()
    return {"epoch": 1, "arch": "gtsrb", "state_dict": state, "best_acc1": best,
            "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    torch.save(their_checkpoint(), tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_a_pth_comes_back_value_by_value(theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompt.safetensors"
    artefact = import_upstream(theirs, out, target(), ["mnist"], mappings=[MAPPING])
    assert (artefact.side, artefact.rings, artefact.batchnorm) == (16, (20, 27), "batch")
    assert [(t.name, t.depth) for t in artefact.tasks] == [("gtsrb", 1), ("mnist", 2)]
    assert torch.equal(artefact.task("mnist").mapping, MAPPING)
    assert remainder_path(out).exists()
    export_upstream(out, tmp_path / "back.pth", target())
    assert same(torch.load(tmp_path / "back.pth"), torch.load(theirs))


def test_the_imported_prompt_computes_what_the_scripts_do(theirs: Path, tmp_path: Path) -> None:
    """By hand: pad, add sigmoid(program) · mask, twice; A with batch statistics; mapping."""
    artefact = import_upstream(theirs, tmp_path / "p", target(), ["mnist"], mappings=[MAPPING])
    x = torch.rand(5, 3, 16, 16)
    seen = x
    for side, pace in (((16, 20), 0.7), ((20, 27), 1.7)):
        made = ring(*side, pace)
        left, right = (side[1] - side[0] + 1) // 2, (side[1] - side[0]) // 2
        seen = nn.functional.pad(seen, (left, right, left, right))
        seen = seen + made["program"].half().float().sigmoid() * made["mask"]
    model = target().model.train()
    expected = model(seen)[:, MAPPING].detach()
    module = artefact.on(target()).task("mnist")
    canvas = module.prompt(x, module.depth)  # the images are normalised already
    found = module.model(canvas)[:, module.mapping]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_comes_back_byte_by_byte(theirs: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    artefact = import_upstream(theirs, first, target(), ["mnist"], mappings=[MAPPING])
    ours = tmp_path / "ours.safetensors"
    save_prompt(ours, replace(artefact, metrics={"epoch": 3, "accuracy": {"mnist": 0.5}}))
    export_upstream(ours, tmp_path / "ours.pth", target())
    saved = torch.load(tmp_path / "ours.pth")
    assert saved["best_acc1"] == 50.0
    assert list(saved["state_dict"])[:4] == list(their_checkpoint()["state_dict"])[:4]
    again = tmp_path / "again.safetensors"
    import_upstream(tmp_path / "ours.pth", again, target(), ["mnist"])
    assert again.read_bytes() == ours.read_bytes()
    saved["state_dict"]["modelA.program"] += 1.0
    torch.save(saved, tmp_path / "changed.pth")
    with pytest.raises(ArtefactError, match="changed after it was exported"):
        import_upstream(tmp_path / "changed.pth", again, target(), ["mnist"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data" / "torchdata"
    write_mnist(root, 10, 220)
    # Class k has 4 (k + 1) of the images: a net that always says the same is told apart as well.
    labels = np.repeat(np.arange(10), 4 * np.arange(1, 11))
    file = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:8] + labels.astype(np.uint8).tobytes())
    write_gtsrb(tmp_path / "data" / "torchdata", 43, 43)
    return tmp_path / "data"


def test_a_replayed_mapping_is_verified(data: Path, theirs: Path, tmp_path: Path) -> None:
    """The recorded accuracy is worked out by hand with the mapping that seed 5 gives."""
    from argparse import Namespace

    from kiop_fast.dropin.replay import replay_mappings

    flags = Namespace(seed=5, backbone_t="ResNet18", backbone_s="ResNet18")
    counts = {"dataset": 10, "real_dataset": 43}
    (drawn,) = replay_mappings("KiOP_BF", flags, counts)
    (other,) = replay_mappings("KiOP_BF", Namespace(**{**vars(flags), "seed": 6}), counts)
    with data_root(str(data)):
        split = dataset("mnist").test(16)
        model, right = target().model.train(), {}
        for name, mapping in (("drawn", drawn), ("other", other)):
            hits = 0
            for images, labels in zip(split.images.split(64), split.labels.split(64), strict=True):
                seen = images.expand(-1, 3, -1, -1) / 255
                for side, pace in (((16, 20), 0.7), ((20, 27), 1.7)):
                    made = ring(*side, pace)
                    left, last = (side[1] - side[0] + 1) // 2, (side[1] - side[0]) // 2
                    seen = nn.functional.pad(seen, (left, last, left, last))
                    seen = seen + made["program"].sigmoid() * made["mask"]
                hits += int((model(seen)[:, mapping].argmax(1) == labels).sum())
            right[name] = 100.0 * hits / len(split.labels)
        assert abs(right["drawn"] - right["other"]) > 1.0  # the two can be told apart
        torch.save(their_checkpoint(right["drawn"]), theirs)
        out = tmp_path / "prompt.safetensors"
        made = import_upstream(theirs, out, target(), ["mnist"], replay=Replay("KiOP_BF", 5))
        assert torch.equal(made.task("mnist").mapping, drawn)
        with pytest.raises(MappingError, match="not the one the prompt was trained with"):
            import_upstream(theirs, out, target(), ["mnist"], replay=Replay("KiOP_BF", 6))
        unverified = import_upstream(theirs, out, target(), ["mnist"], replay=Replay("KiOP_BF", 6),
                                     verify=False)  # fmt: skip
        assert torch.equal(unverified.task("mnist").mapping, other)


@pytest.mark.parametrize(
    ("change", "given", "error", "said"),
    [
        (None, {}, MappingError, "do not save the label mapping"),
        (None, {"mappings": [MAPPING[:4]]}, MappingError, "do not fit the providers"),
        (
            None,
            {"mappings": [MAPPING + 10]},
            ArtefactError,
            "classes that the target does not have",
        ),
        ("modelB.classify.bias", {"mappings": [MAPPING]}, ArtefactError, "another model A"),
        ("modelD.mask", {"mappings": [MAPPING]}, ArtefactError, "no square ring"),
    ],
)
def test_bad_checkpoints(
    change: str | None, given: dict[str, Any], error: type[KiopError], said: str, tmp_path: Path
) -> None:
    content = their_checkpoint()
    if change:
        content["state_dict"][change] = content["state_dict"][change] + 1
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(error, match=said):
        import_upstream(tmp_path / "x.pth", tmp_path / "p", target(), ["mnist"], **given)
    assert not (tmp_path / "p").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "x.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ArtefactError, match=r"fc\.weight"):
        read_checkpoint(tmp_path / "x.pth")
    assert parse_mapping("3, 1 2").tolist() == [3, 1, 2]
    (tmp_path / "m.txt").write_text("3\n1\n")
    assert parse_mapping(str(tmp_path / "m.txt")).tolist() == [3, 1]
    with pytest.raises(MappingError, match="list of A's classes"):
        parse_mapping("a,b")


def test_prompts_the_scripts_do_not_know(theirs: Path, tmp_path: Path) -> None:
    artefact = import_upstream(theirs, tmp_path / "p", target(), ["mnist"], mappings=[MAPPING])
    odd = replace(artefact, tasks=(artefact.tasks[0], replace(artefact.tasks[1], depth=1)))
    save_prompt(tmp_path / "odd.safetensors", odd)
    with pytest.raises(ArtefactError, match="no prompt of this shape"):
        export_upstream(tmp_path / "odd.safetensors", tmp_path / "x.pth", target())
    save_prompt(
        tmp_path / "q.safetensors", replace(artefact, cells=[c + 1 for c in artefact.cells])
    )
    remainder_path(tmp_path / "p").rename(remainder_path(tmp_path / "q.safetensors"))
    with pytest.raises(ArtefactError, match="belongs to another prompt"):
        export_upstream(tmp_path / "q.safetensors", tmp_path / "x.pth", target())


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through files alone, with a small net of the zoo as model A."""
    from kiop_fast.source import build

    monkeypatch.chdir(tmp_path)
    model = build("resnet8", 43, (16, 20, 27))
    torch.save(model.state_dict(), "a.pth")
    content = their_checkpoint()
    state = {k: v for k, v in content["state_dict"].items() if not k.startswith("modelB.")}
    content["state_dict"] = {**state, **{f"modelB.{k}": v for k, v in model.state_dict().items()}}
    torch.save(content, "theirs.pth")
    common = ["--target", "resnet8@gtsrb=a.pth"]
    mapping = ",".join(map(str, MAPPING.tolist()))
    said = CliRunner().invoke(app, ["import-upstream", "theirs.pth", *common, "--provider", "mnist",
                                    "--mapping", mapping, "--out", "p.safetensors"])  # fmt: skip
    assert said.exit_code == 0, said.output
    assert torch.equal(load_prompt("p.safetensors").task("mnist").mapping, MAPPING)
    said = CliRunner().invoke(app, ["export-upstream", "p.safetensors", *common, "--out", "b.pth"])
    assert said.exit_code == 0, said.output
    assert same(torch.load("b.pth"), torch.load("theirs.pth"))
    said = CliRunner().invoke(
        app, ["import-upstream", "theirs.pth", *common, "--provider", "mnist"]
    )
    assert said.exit_code == 2
    assert "--mapping" in said.output
