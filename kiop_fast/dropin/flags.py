"""The command lines of the authors' three scripts, flag by flag, and what each does here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NoReturn

from kiop_fast.errors import ConfigError, unknown_name

METHODS = ("zskt", "dfad", "dafl", "deepinv", "dfq", "cmi")
SCRIPTS = ("KiOP_BF", "KiOP_B", "KiOP_triple")


@dataclass(frozen=True)
class Flag:
    """One flag of the scripts.

    Attributes:
        names: as written; the first decides the attribute unless ``dest`` is given.
        default: the script's.
        kind: what its value is read with; None for a switch.
        note: said when the flag is given and does nothing (or less than its name says).
        only: scripts that have it; empty for all.
    """

    names: tuple[str, ...]
    default: Any = None
    kind: type | None = str
    note: str = ""
    only: tuple[str, ...] = ()
    dest: str = ""
    required: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """Attribute of the parsed flags."""
        return self.dest or next(n for n in self.names if n.startswith("--"))[2:]


_BF, _T = ("KiOP_BF", "KiOP_triple"), ("KiOP_triple",)
_GENERATIVE = "used by --method dafl, dfq, zskt and dfad; contrastive inversion has no such term"
_ONE = "one process and one device are used; the numbers do not depend on it"

FLAGS: tuple[Flag, ...] = (
    Flag(("--method",), required=True, choices=METHODS),
    Flag(("--cn",), 3, int),
    Flag(("--adv",), 0.0, float),
    Flag(("--bn",), 0.0, float),
    Flag(("--oh",), 0.0, float),
    Flag(("--act",), 0.0, float, _GENERATIVE),
    Flag(("--balance",), 0.0, float, _GENERATIVE),
    Flag(("--save_dir",), "run/synthesis"),
    Flag(("--save_dir_1",), "run/synthesis", only=_BF),
    Flag(("--save_dir_2",), "run/synthesis", only=_T),
    Flag(("--cr",), 1.0, float),
    Flag(("--cr_T",), 0.5, float),
    Flag(("--cmi_init",)),
    Flag(("--data_root",), "data"),
    Flag(("--teacher",), "wrn40_2"),
    Flag(("--student",), "wrn16_1"),
    Flag(("--son",), "wrn16_1", note="the scripts use it in the name of distributed logs alone",
         only=_T),
    Flag(("--backbone_t",), "ResNet18"),
    Flag(("--backbone_s",), "ResNet50"),
    Flag(("--backbone_l",), "ResNet18", only=_T),
    Flag(("--dataset",), "cifar10"),
    Flag(("--real_dataset",), "cifar100"),
    Flag(("--son_dataset",), "cifar100", only=_T),
    Flag(("--lr",), 0.1, float),
    Flag(("--lr_decay_milestones",), "120,150,180",
         note="the scripts anneal the rate over the epochs (cosine) and never read it"),
    Flag(("--lr_g",), 1e-3, float),
    Flag(("--T",), 1.0, float),
    Flag(("--epochs",), 100, int),
    Flag(("--g_steps",), 1, int),
    Flag(("--kd_steps",), 400, int),
    Flag(("--ep_steps",), 400, int),
    Flag(("--resume",), ""),
    Flag(("--evaluate_only",), False, None),
    Flag(("--batch_size",), 128, int),
    Flag(("--synthesis_batch_size",), None, int),
    Flag(("--gpu",), 0, int),
    Flag(("--world_size",), -1, int, _ONE),
    Flag(("--rank",), -1, int, _ONE),
    Flag(("--dist_url",), "tcp://224.66.41.62:23456", note=_ONE),
    Flag(("--dist_backend",), "nccl", note=_ONE),
    Flag(("--multiprocessing_distributed",), False, None, _ONE),
    Flag(("--fp16",), False, None),
    Flag(("--seed",), None, int),
    Flag(("--log_tag",), ""),
    Flag(("-j", "--workers"), 4, int, "the images stay in memory, no process loads them"),
    Flag(("--start_epoch",), 0, int),
    Flag(("--momentum",), 0.9, float, "the scripts fix the momentum at 0.9 and never read it"),
    Flag(("--wd", "--weight_decay"), 1e-4, float, dest="weight_decay"),
    Flag(("-p", "--print_freq"), 0, int),
    Flag(("--pretrained",), False, None,
         "the scripts never read it; the weights are those of the checkpoints"),
    Flag(("--img_size",), 32, int),
    Flag(("--vp1_size",), 36, int),
    Flag(("--vp2_size",), 224, int),
    Flag(("--vp3_size",), 224, int, only=_T),
)  # fmt: skip

# Where a script's default differs from the table's.
_DEFAULTS: dict[str, dict[str, Any]] = {"KiOP_triple": {"backbone_s": "ResNet18"}}


def script_name(text: str) -> str:
    """``KiOP_BF``, ``KiOP_BF.py`` or a path to it, as one of :data:`SCRIPTS`.

    Capitals do not matter: the authors' own ``KiOP_triple.sh`` writes ``KiOP_Triple.py``.
    """
    name = PurePath(text).name.removesuffix(".py")
    for script in SCRIPTS:
        if name.lower() == script.lower():
            return script
    raise unknown_name("script", name, SCRIPTS, ConfigError)


def flags_of(script: str) -> list[Flag]:
    """The flags that a script has."""
    return [flag for flag in FLAGS if not flag.only or script in flag.only]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog} does not take these flags", got=message,
                          expected="the flags of the authors' script",
                          fix=f"see python -m kiop_fast.upstream {self.prog} --help")  # fmt: skip


def parser(script: str, *, defaults: bool = True) -> argparse.ArgumentParser:
    """A parser of a script's flags; without ``defaults``, only what is given is set."""
    made = _Parser(prog=script, description=f"The flags of the authors' {script}.py, verbatim.")
    for flag in flags_of(script):
        default = _DEFAULTS.get(script, {}).get(flag.key, flag.default)
        options: dict[str, Any] = {"default": default if defaults else argparse.SUPPRESS,
                                   "dest": flag.key}  # fmt: skip
        if flag.kind is None:
            options["action"] = "store_true"
        else:
            options.update(type=flag.kind, required=flag.required and defaults)
            if flag.choices:
                options["choices"] = flag.choices
        made.add_argument(*flag.names, help=flag.note or None, **options)
    return made


def parse(script: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags with the script's defaults, and a note for each given one that does nothing.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type, no ``--method``.
    """
    flags = parser(script).parse_args(list(arguments))
    given = vars(parser(script, defaults=False).parse_args(list(arguments)))
    return flags, notes(flags, given)


def notes(flags: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """What to say about the flags that were given."""
    said = []
    used = ("act", "balance") if flags.method in ("dafl", "dfq", "zskt", "dfad") else ()
    for flag in FLAGS:
        if flag.key in given and flag.note and flag.key not in used:
            said.append(f"--{flag.key} has no effect: {flag.note}")
    if given.get("teacher") == "resnet34":
        said.append("--teacher resnet34 names the log and the checkpoint; the contrastive features "
                    "stay those of all BatchNorm layers (the scripts' switch to the four stages "
                    "fails as soon as A synthesizes)")  # fmt: skip
    if flags.cn == 1:
        said.append("--cn 1 makes grey images for grey data, latent 128, width 56, at --img_size")
    if flags.fp16:
        said.append("--fp16 computes products in bfloat16, which needs no loss scaling")
    if flags.seed is None:
        said.append("no --seed: one is drawn and written to the run folder")
    return said
