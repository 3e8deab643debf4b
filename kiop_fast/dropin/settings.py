"""From the scripts' flags to this project's settings and sources (SPEC sections 8 and 9)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override
from kiop_fast.data import dataset
from kiop_fast.errors import ConfigError, SourceError, unknown_name
from kiop_fast.presets import preset
from kiop_fast.source import SourceSpec

BACKBONES = {"ResNet18": "resnet18", "ResNet50": "resnet50", "ResNet101": "resnet101",
             "vgg13": "vgg13_bn"}  # fmt: skip
_LATENT = {"cmi": 256, "deepinv": 256, "dafl": 512}  # width of z; 256 for the others
GENERATIVE = ("zskt", "dfad", "dfq", "dafl")


def checkpoint_paths(backbone: str, data: str) -> list[Path]:
    """Where a source's weights may lie in the working folder, the scripts' own name first."""
    if backbone not in BACKBONES:
        raise unknown_name("backbone", backbone, BACKBONES, SourceError)
    middle = "_bn" if backbone == "vgg13" else "_32" if data in ("mnist", "fmnist") else ""
    plain = f"{backbone}_{data}"
    named = f"{backbone}{middle}_{data}"
    stems = [named] if named == plain else [named, plain]
    return [Path(stem + end) for stem in stems for end in ("", ".pth", ".pt", ".safetensors")]


def source_spec(backbone: str, data: str) -> SourceSpec:
    """The source of a backbone and a dataset, found in the working folder.

    Raises:
        SourceError: an unknown backbone, or no file under any of the names.
    """
    paths = checkpoint_paths(backbone, data)
    for path in paths:
        if path.is_file():
            return SourceSpec("zoo", BACKBONES[backbone], data, path)
    raise SourceError(
        f"no checkpoint of {backbone} for {data}",
        got="looked at " + ", ".join(map(str, paths)) + f" in {Path.cwd()}",
        expected=f"a torch state dict named {paths[0]}",
        fix="run where the checkpoints lie, or copy one there under that name",
    )


def source_specs(script: str, flags: Namespace) -> list[SourceSpec]:
    """A's, then the providers'."""
    named = [(flags.backbone_s, flags.real_dataset), (flags.backbone_t, flags.dataset)]
    if script == "KiOP_triple":
        named.append((flags.backbone_l, flags.son_dataset))
    return [source_spec(backbone, data.lower()) for backbone, data in named]


def class_counts(flags: Namespace) -> dict[str, int]:
    """Classes by dataset flag."""
    keys = [key for key in ("dataset", "real_dataset", "son_dataset") if hasattr(flags, key)]
    return {key: len(dataset(getattr(flags, key).lower()).info.classes) for key in keys}


def rings(script: str, flags: Namespace) -> list[int]:
    """Ring sides; two equal sizes are one undivided ring, as in KiOP_B."""
    sizes = [flags.vp1_size, flags.vp2_size]
    if script == "KiOP_triple":
        return [*sizes, flags.vp3_size]
    return sizes[:1] if sizes[0] == sizes[1] else sizes


def device(flags: Namespace) -> str:
    """``cuda:N`` for ``--gpu N``; the CPU where torch sees no GPU."""
    return f"cuda:{flags.gpu}" if torch.cuda.is_available() else "cpu"


def run_config(script: str, flags: Namespace, specs: list[SourceSpec]) -> RunConfig:
    """Preset ``upstream`` with the flags put over it; ``flags.seed`` is a number.

    Raises:
        ConfigError: flags that contradict each other.
    """
    check(script, flags)
    generative = flags.method in GENERATIVE
    cells = {"rings": rings(script, flags)}
    synthesis: dict[str, Any] = {
        "batch": flags.synthesis_batch_size or flags.batch_size, "steps": flags.g_steps,
        "lr": flags.lr_g, "bn": flags.bn, "oh": flags.oh, "adv": flags.adv,
        "cr": flags.cr if flags.method == "cmi" else 0.0, "cr_temperature": flags.cr_T,
        "latent": 128 if flags.cn == 1 else _LATENT.get(flags.method, 256),
        "width": 56 if flags.cn == 1 else 64, "grey": flags.cn == 1,
    }  # fmt: skip
    storing = {
        "steps": flags.kd_steps, "batch": flags.batch_size, "batch_real": flags.batch_size,
        "lr": flags.lr, "weight_decay": flags.weight_decay,
        "temperature": 1.0 if generative else flags.T,
    }  # fmt: skip
    return override(preset("upstream"), {
        "mode": "b" if script == "KiOP_B" else "bf", "side": flags.img_size,
        "target": str(specs[0]), "providers": [str(spec) for spec in specs[1:]],
        "epochs": flags.epochs, "rounds": flags.ep_steps // flags.kd_steps, "seed": flags.seed,
        "device": device(flags), "prompt": cells,
        "precision": "bf16" if flags.fp16 else "fp32", "synthesis": synthesis, "storing": storing,
        "evaluation": {"every": 0, "batch": flags.batch_size},
    })  # fmt: skip


def check(script: str, flags: Namespace) -> None:
    """Raise ConfigError for flags that contradict each other."""
    if flags.cn not in (1, 3):
        raise ConfigError("--cn is the number of channels of the synthetic images", got=flags.cn,
                          expected="3, or 1 for grey data", fix="set --cn 3")  # fmt: skip
    if flags.cn == 1 and flags.method != "cmi":
        raise ConfigError("--cn 1 belongs to --method cmi", got=f"--method {flags.method}",
                          expected="--cn 3", fix="set --cn 3")  # fmt: skip
    if flags.kd_steps < 1 or flags.ep_steps < flags.kd_steps:
        raise ConfigError(
            "an epoch has no round: it takes ep_steps // kd_steps of them",
            got=f"--ep_steps {flags.ep_steps} --kd_steps {flags.kd_steps}",
            expected="--ep_steps of at least --kd_steps", fix="raise --ep_steps",
        )  # fmt: skip
    if not 0 <= flags.start_epoch < flags.epochs:
        raise ConfigError("nothing is left to do", got=f"--start_epoch {flags.start_epoch}",
                          expected=f"0 … {flags.epochs - 1}", fix="raise --epochs")  # fmt: skip
    folders = save_folders(script, flags)
    if flags.method not in GENERATIVE and len({f.resolve() for f in folders}) < len(folders):
        raise ConfigError(
            "two banks of images would share one folder (the scripts then mix them)",
            got=", ".join(f"--save_dir{'' if not i else f'_{i}'} {f}"
                          for i, f in enumerate(folders)),
            expected="one folder each", fix="give each --save_dir its own",
        )  # fmt: skip


def save_folders(script: str, flags: Namespace) -> list[Path]:
    """Where the PNGs of B's, A's and the third model's bank go, in the scripts' order."""
    keys = {"KiOP_B": 1, "KiOP_BF": 2, "KiOP_triple": 3}[script]
    return [Path(getattr(flags, key)) for key in ("save_dir", "save_dir_1", "save_dir_2")[:keys]]
