"""The scripts' flags: all there, each with an effect or a note, errors that say what to do."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kiop_fast.config import to_dict
from kiop_fast.dropin import logs, settings
from kiop_fast.dropin.flags import FLAGS, SCRIPTS, flags_of, parse, script_name
from kiop_fast.dropin.replay import replay_mappings
from kiop_fast.errors import ConfigError, DataError, KiopError, MappingError, SourceError
from kiop_fast.source import SourceSpec

# Every flag of KiOP_BF.py as its parser names them, in its order (November 2026).
_BF = """method cn adv bn oh act balance save_dir save_dir_1 cr cr_T cmi_init data_root teacher
backbone_t backbone_s student dataset real_dataset lr lr_decay_milestones lr_g T epochs g_steps
kd_steps ep_steps resume evaluate_only batch_size synthesis_batch_size gpu world_size rank dist_url
dist_backend multiprocessing_distributed fp16 seed log_tag workers start_epoch momentum weight_decay
print_freq pretrained img_size vp1_size vp2_size"""
BF = _BF.split()
ALL = {
    "KiOP_BF": set(BF),
    "KiOP_B": set(BF) - {"save_dir_1"},
    "KiOP_triple": {*BF, "save_dir_2", "backbone_l", "son", "son_dataset", "vp3_size"},
}
BASE = ["--method", "cmi", "--dataset", "mnist", "--real_dataset", "gtsrb", "--seed", "0",
        "--save_dir", "b", "--save_dir_1", "a"]  # fmt: skip
TRIPLE = [*BASE, "--save_dir_2", "c", "--son_dataset", "svhn"]
UPSTREAM = os.environ.get("KIOP_UPSTREAM", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_every_script_is_taken(script: str) -> None:
    assert {flag.key for flag in flags_of(script)} == ALL[script]


@pytest.mark.skipif(not UPSTREAM, reason="KIOP_UPSTREAM names no checkout of the authors' code")
@pytest.mark.parametrize("script", SCRIPTS)
def test_names_and_defaults_are_those_in_the_checkout(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's own parser, run as it stands, gives the same defaults."""
    source = (Path(UPSTREAM) / f"{script}.py").read_text()
    lines = re.findall(r"^parser\.add_argument\((?:.|\n)*?\)$", source, re.MULTILINE)
    parser = argparse.ArgumentParser()
    for line in lines:
        exec(line, {"parser": parser})
    theirs = vars(parser.parse_args(["--method", "cmi"]))
    assert vars(parse(script, ["--method", "cmi"])[0]) == theirs


def decided(script: str, arguments: list[str]) -> Any:
    """All that the flags decide before anything is read."""
    flags, _ = parse(script, arguments)
    flags.seed = flags.seed or 0
    pairs = [(flags.backbone_s, flags.real_dataset), (flags.backbone_t, flags.dataset)]
    if script == "KiOP_triple":
        pairs.append((flags.backbone_l, flags.son_dataset))
    specs = [SourceSpec("zoo", settings.BACKBONES[b], d, settings.checkpoint_paths(b, d)[0])
             for b, d in pairs]  # fmt: skip
    return (
        to_dict(settings.run_config(script, flags, specs)), settings.save_folders(script, flags),
        logs.folder(flags), logs.names(flags), logs.tag(flags),
    )  # fmt: skip


VALUES: dict[str, list[str]] = {
    "--method": ["deepinv"], "--cn": ["1"], "--cmi_init": ["x"], "--resume": ["x"],
    "--teacher": ["other"], "--dist_url": ["env://"], "--dist_backend": ["gloo"],
    "--backbone_t": ["vgg13"], "--backbone_s": ["ResNet101"], "--backbone_l": ["ResNet50"],
    "--dataset": ["fmnist"], "--real_dataset": ["cifar100"], "--son_dataset": ["cifar10"],
    "--son": ["other"], "--student": ["other"], "--log_tag": ["x"], "--data_root": ["x"],
    "--save_dir": ["x"], "--save_dir_1": ["x"], "--save_dir_2": ["x"], "--ep_steps": ["800"],
    "--kd_steps": ["200"], "--lr_decay_milestones": ["1,2"], "--gpu": ["1"], "--seed": ["3"],
    "--vp1_size": ["40"], "--vp2_size": ["128"], "--vp3_size": ["256"], "--img_size": ["28"],
    "--start_epoch": ["5"], "--evaluate_only": [], "--fp16": [], "--pretrained": [],
    "--multiprocessing_distributed": [],
}  # fmt: skip
# Effects that show while running: tests/test_upstream_command.py (--gpu: device below).
SHOWN_ELSEWHERE = {"cmi_init", "resume", "evaluate_only", "data_root", "gpu", "print_freq",
                   "start_epoch"}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.key)
def test_every_flag_has_an_effect_or_a_note(flag: Any) -> None:
    script = "KiOP_triple" if flag.only == ("KiOP_triple",) else "KiOP_BF"
    base = TRIPLE if script == "KiOP_triple" else BASE
    if script == "KiOP_triple":
        base = [*base, "--vp2_size", "128"]
    long = next(name for name in flag.names if name.startswith("--"))
    change = [long, *VALUES.get(long, ["7"])]
    _, notes = parse(script, [*base, *change])
    said = any(note.startswith(long) for note in notes)
    if flag.note:
        assert said
        assert decided(script, [*base, *change]) == decided(script, base)
    elif flag.key not in SHOWN_ELSEWHERE:
        assert decided(script, [*base, *change]) != decided(script, base)


def test_notes_only_for_what_is_given_and_unused() -> None:
    assert parse("KiOP_BF", BASE)[1] == []
    generative = ["--method", "dafl", "--seed", "0", "--act", "0.1", "--balance", "0.2"]
    assert parse("KiOP_BF", generative)[1] == []
    said = parse("KiOP_BF", ["--method", "cmi", "--teacher", "resnet34", "--fp16"])[1]
    assert [note.split()[0] for note in said] == ["--teacher", "--fp16", "no"]


def test_values_arrive_where_they_belong() -> None:
    """The whole of the authors' KiOP_BF.sh, against SPEC section 8."""
    line = """--cn 3 --method cmi --backbone_t ResNet18 --backbone_s ResNet18 --dataset cifar10
    --real_dataset gtsrb --img_size 32 --vp1_size 36 --vp2_size 128 --batch_size 64
    --teacher cifar10 --student gtsrb --lr 0.8 --kd_steps 400 --ep_steps 400 --g_steps 200
    --lr_g 0.01 --adv 0.5 --bn 1.0 --oh 1.0 --cr 0.8 --cr_T 0.6 --act 0 --balance 0.2 --gpu 0
    --seed 0 --T 20 --save_dir run/1 --save_dir_1 run/2 --log_tag kiop"""
    config, folders, folder, names, tag = decided("KiOP_BF", line.split())
    from kiop_fast.presets import preset

    wanted = to_dict(preset("upstream"))
    wanted["target"] = "resnet18@gtsrb=ResNet18_gtsrb"
    wanted["providers"] = ["resnet18@cifar10=ResNet18_cifar10"]
    wanted["device"] = "cuda:0" if torch.cuda.is_available() else "cpu"
    wanted["evaluation"]["every"] = 0
    wanted["storing"]["batch_real"] = 64
    assert config == wanted
    assert [str(f) for f in folders] == ["run/1", "run/2"]
    assert (str(folder), names, tag) == (
        "checkpoints/datafree-cmi",
        "cifar10-cifar10-gtsrb",
        "-kiop",
    )


def test_gpu_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, _ = parse("KiOP_BF", [*BASE, "--gpu", "3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.device(flags) == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings.device(flags) == "cpu"


def test_equal_sizes_are_one_ring() -> None:
    config = decided("KiOP_B", [*BASE[:-2], "--vp1_size", "64", "--vp2_size", "64"])[0]
    assert (config["prompt"]["rings"], config["mode"]) == ([64], "b")
    config = decided("KiOP_triple", [*TRIPLE, "--vp2_size", "128"])[0]
    assert (config["prompt"]["rings"], config["prompt"]["disjoint"]) == ([36, 128, 224], True)


@pytest.mark.parametrize(
    ("backbone", "data", "first"),
    [("ResNet18", "cifar10", "ResNet18_cifar10"), ("ResNet18", "mnist", "ResNet18_32_mnist"),
     ("ResNet50", "fmnist", "ResNet50_32_fmnist"), ("vgg13", "cifar10", "vgg13_bn_cifar10"),
     ("vgg13", "mnist", "vgg13_bn_mnist")],
)  # fmt: skip
def test_checkpoints_by_their_names(backbone: str, data: str, first: str) -> None:
    """SPEC section 10."""
    assert str(settings.checkpoint_paths(backbone, data)[0]) == first


@pytest.mark.parametrize("text", ["KiOP_BF", "KiOP_BF.py", "./x/KiOP_BF.py", "kiop_bf"])
def test_script_names(text: str) -> None:
    assert script_name(text) == "KiOP_BF"
    assert script_name("KiOP_Triple.py") == "KiOP_triple"  # as in the authors' KiOP_triple.sh


@pytest.mark.parametrize(
    ("script", "change", "error", "said"),
    [
        ("KiOP_C", [], ConfigError, "KiOP_B"),
        ("KiOP_BF", ["--cr_t", "1"], ConfigError, "--cr_t"),
        ("KiOP_BF", ["--epochs", "many"], ConfigError, "--epochs"),
        ("KiOP_B", ["--save_dir_1", "a"], ConfigError, "--save_dir_1"),
        ("KiOP_BF", ["--method", "gan"], ConfigError, "gan"),
        ("KiOP_BF", ["--cn", "2"], ConfigError, "channels"),
        ("KiOP_BF", ["--cn", "1", "--method", "deepinv"], ConfigError, "--method cmi"),
        ("KiOP_BF", ["--kd_steps", "500"], ConfigError, "no round"),
        ("KiOP_BF", ["--start_epoch", "100"], ConfigError, "nothing is left"),
        ("KiOP_BF", ["--save_dir", "a"], ConfigError, "share one folder"),
        ("KiOP_BF", ["--vp1_size", "32"], ConfigError, "first ring"),
        ("KiOP_BF", ["--vp2_size", "30"], ConfigError, "grow outwards"),
        ("KiOP_BF", ["--lr", "0"], ConfigError, "storing.lr"),
        ("KiOP_BF", ["--dataset", "imagenet"], DataError, "imagenet"),
        ("KiOP_BF", ["--backbone_t", "ResNet34"], SourceError, "ResNet18"),
        ("KiOP_BF", ["--resume", "x.pth"], KiopError, "x.pth, checkpoints/datafree-cmi/x.pth"),
        ("KiOP_BF", [], SourceError, "ResNet50_gtsrb, ResNet50_gtsrb.pth"),
    ],
)  # fmt: skip
def test_bad_input(
    script: str, change: list[str], error: type[KiopError], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from kiop_fast.dropin.command import run_upstream

    monkeypatch.chdir(tmp_path)
    if change:
        for name in ("ResNet50_gtsrb", "ResNet18_32_mnist"):
            (tmp_path / name).touch()
    base = BASE if script != "KiOP_B" else BASE[:-2]
    with pytest.raises(error, match=re.escape(said)):
        run_upstream(script, [*base, *change])
    assert not (tmp_path / "checkpoints").exists()  # nothing is written before all is checked


def test_mappings_are_disjoint_parts_of_one_permutation() -> None:
    flags, _ = parse("KiOP_triple", TRIPLE)
    flags.backbone_s = "ResNet18"
    counts = {"dataset": 10, "real_dataset": 43, "son_dataset": 10}
    before = torch.random.get_rng_state()
    first, second = replay_mappings("KiOP_triple", flags, counts)
    again = replay_mappings("KiOP_triple", flags, counts)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({*first.tolist(), *second.tolist()}) == 20
    assert first.tolist() == again[0].tolist()
    with pytest.raises(MappingError, match="at least 20"):
        replay_mappings("KiOP_triple", flags, {**counts, "real_dataset": 10})
