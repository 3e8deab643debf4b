"""``--resume`` and ``--start_epoch``: a run that begins in the middle."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kiop_fast.config_io import dump_toml
from kiop_fast.dropin.checkpoint import UpstreamCheckpoint, read_checkpoint
from kiop_fast.errors import ArtefactError, ConfigError, RunError
from kiop_fast.run import Run
from kiop_fast.run_state import run_state
from kiop_fast.runtime.device import choose_device
from kiop_fast.runtime.files import atomic_write, load_tensors, save_tensors

if TYPE_CHECKING:
    from kiop_fast.dropin.command import Job


def find(flags: Namespace) -> UpstreamCheckpoint | None:
    """The checkpoint that ``--resume`` names; None where it was not given.

    Raises:
        ArtefactError: it is not there (the scripts would start anew without a word).
    """
    if not flags.resume:
        return None
    looked = [Path(flags.resume), Path("checkpoints") / f"datafree-{flags.method}" / flags.resume]
    for path in looked:
        if path.is_file():
            return read_checkpoint(path)
    raise ArtefactError("no checkpoint to resume from", got=", ".join(map(str, looked)),
                        expected="a .pth that a script or this command wrote",
                        fix="check --resume")  # fmt: skip


def run_folder(job: Job, base: Path) -> tuple[Path, bool]:
    """The folder a job works in, and whether it continues what is there.

    A run that is still where the ``.pth`` says, at that epoch and with these settings, goes on
    exactly.  Otherwise prompt and momentum come from the ``.pth``, the banks so far from the run
    if it is there, and the projection heads start anew (as the scripts' do).
    """
    flags, found = job.flags, job.resumed
    start = found.epoch if found else flags.start_epoch
    if start >= flags.epochs:
        raise ConfigError("nothing is left to do", got=f"{start} epochs done of {flags.epochs}",
                          fix="raise --epochs")  # fmt: skip
    old = Path(found.own["run"]) if found and found.own.get("run") else None
    if old is not None and _epochs_done(old, job.config.digest()) == start:
        return old, True
    out = _new(base)
    if start:
        _begin_at(job, out, start, old)
    return out, bool(start)


def _new(base: Path) -> Path:
    """``base``, or the first of ``base-2``, ``base-3`` … that is free."""
    path, count = base, 2
    while path.exists():
        path, count = base.with_name(f"{base.name}-{count}"), count + 1
    return path


def _epochs_done(folder: Path, digest: str) -> int:
    """Epochs of the run in a folder; -1 if there is none with this digest."""
    try:
        facts = load_tensors(folder / "checkpoint.safetensors")[1]
    except RunError:
        return -1
    return int(facts["epochs_done"]) if facts.get("digest") == digest else -1


def _begin_at(job: Job, out: Path, start: int, old: Path | None) -> None:
    """Write a run folder as if ``start`` epochs were done."""
    config = job.config
    run = Run(config, job.sources, choose_device(config.device), out / "scratch")
    job.prepare(run)
    if job.resumed is not None:
        give(run, job.resumed)
    facts = {"digest": config.digest(), "epochs_done": start,
             "sources": job.sources.fingerprints()}  # fmt: skip
    for folder in sorted((old / "banks").glob("*")) if old else []:
        for file in sorted(folder.glob("*.safetensors")):
            if int(file.stem) < start:
                (out / "banks" / folder.name).mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, out / "banks" / folder.name / file.name)
    save_tensors(out / "checkpoint.safetensors", run_state(run), facts)
    atomic_write(out / "config.toml", dump_toml(config))


@torch.no_grad()
def give(run: Run, found: UpstreamCheckpoint) -> None:
    """Put a checkpoint's cells and momentum into a run.

    Raises:
        ArtefactError: other rings.
    """
    assert run.prompt is not None
    if (found.side, found.rings) != (run.config.side, run.config.prompt.rings):
        raise ArtefactError(
            "the checkpoint has other rings", got=f"image {found.side}, rings {list(found.rings)}",
            expected=f"image {run.config.side}, rings {list(run.config.prompt.rings)}",
            fix="set --img_size and --vp1_size, --vp2_size, --vp3_size as it was made",
        )  # fmt: skip
    for cells, values in zip(run.prompt.cells, found.cells, strict=True):
        cells.copy_(values)
    for cells, values in zip(run.trained, found.momentum or [], strict=False):
        run.optimizer.state[cells]["momentum_buffer"] = values.to(cells)
