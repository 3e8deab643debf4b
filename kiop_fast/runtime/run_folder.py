"""A run on disk: ``config.toml``, metrics, timings, the checkpoint and the banks.

The checkpoint is the commit point of an epoch.  Bank files and metrics of an epoch are written
before it; whatever they hold beyond the checkpoint's epoch after a kill is dropped on resume.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kiop_fast.errors import RunError
from kiop_fast.runtime.files import (
    atomic_write,
    load_tensors,
    read_lines,
    remove_leftovers,
    save_tensors,
    write_lines,
)


class RunFolder:
    """One run's folder; nothing is written before :meth:`begin`.

    Args:
        path: the folder, made if absent.
        config: the run's settings as TOML text.
        digest: of everything that decides the run's numbers.
        resume: continue the run that is there, if there is one.

    Raises:
        RunError: the folder holds a run and ``resume`` is off, or it holds a different run.
    """

    def __init__(self, path: Path, config: str, digest: str, *, resume: bool) -> None:
        self.path, self.digest = path, digest
        self.metrics: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.epochs_done = 0
        marker = path / "config.toml"
        if marker.exists() and not resume:
            raise RunError(
                "the folder already holds a run", got=path,
                expected="a new folder, or --resume to continue that run",
                fix="choose another --out, add --resume, or delete the folder",
            )  # fmt: skip
        if path.exists() and not path.is_dir():
            raise RunError("the run folder is a file", got=path, fix="choose another --out")
        self._restored: dict[str, Tensor] = {}
        if (path / "checkpoint.safetensors").exists():
            self._restore()
        elif marker.exists() and marker.read_text() != config:
            self._other_run(f"{marker} differs")
        self._config = config

    def begin(self) -> None:
        """Claim the folder, and drop what a kill left behind the last checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        atomic_write(self.path / "config.toml", self._config)
        if self.epochs_done:
            write_lines(self.path / "metrics.jsonl", self.metrics)
            write_lines(self.path / "timings.jsonl", self.timings)
        for file in (self.path / "banks").glob("*/*.safetensors"):
            if int(file.stem) >= self.epochs_done:
                file.unlink()

    def _other_run(self, got: str) -> None:
        raise RunError(
            "the folder holds a run with other settings", got=got,
            expected="the settings in its config.toml",
            fix=f"resume with --config {self.path / 'config.toml'}, or choose another --out",
        )  # fmt: skip

    def _restore(self) -> None:
        tensors, facts = load_tensors(self.path / "checkpoint.safetensors")
        if facts.get("digest") != self.digest:
            self._other_run(f"settings digest {str(facts.get('digest'))[:12]}…")
        self._restored, self.epochs_done = tensors, int(facts["epochs_done"])
        self.sources: dict[str, str] = facts["sources"]
        self.metrics = read_lines(self.path / "metrics.jsonl")[: self.epochs_done]
        self.timings = read_lines(self.path / "timings.jsonl")[: self.epochs_done]

    def restored(self, sources: Mapping[str, str]) -> dict[str, Tensor]:
        """The checkpoint's tensors; empty for a new run.

        Args:
            sources: sha256 of every source by name; they must be those the run began with.
        """
        if self._restored and dict(sources) != self.sources:
            changed = [name for name in sources if self.sources.get(name) != sources[name]]
            raise RunError(
                "the sources are not those this run began with", got=", ".join(changed),
                expected="the same weights", fix="give the same source files, or start a new run",
            )  # fmt: skip
        return self._restored

    def bank(self, task: str) -> Iterator[dict[str, Tensor]]:
        """Images, targets and features of a task, one file an epoch, in order."""
        for file in sorted((self.path / "banks" / task).glob("*.safetensors")):
            yield load_tensors(file)[0]

    def save_bank(self, task: str, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Add what one synthesize period of a task made."""
        save_tensors(self.path / "banks" / task / f"{epoch:05d}.safetensors", tensors, {})

    def save_epoch(
        self, metrics: dict[str, Any], timings: dict[str, Any], state: Mapping[str, Tensor],
        sources: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Commit an epoch: metrics and timings first, the checkpoint last."""
        self.metrics.append(metrics)
        self.timings.append(timings)
        write_lines(self.path / "metrics.jsonl", self.metrics)
        write_lines(self.path / "timings.jsonl", self.timings)
        self.epochs_done += 1
        facts = {"digest": self.digest, "epochs_done": self.epochs_done, "sources": dict(sources)}
        save_tensors(self.path / "checkpoint.safetensors", state, facts)

    def clear_scratch(self) -> None:
        """Delete the engine's own files; the banks hold the same images."""
        shutil.rmtree(self.path / "scratch", ignore_errors=True)
