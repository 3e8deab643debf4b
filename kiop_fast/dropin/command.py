"""``kiop-fast upstream SCRIPT FLAGS``: the scripts' work, done by this project's engine."""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiop_fast.deliver.evaluate import forget_test_data, read_test
from kiop_fast.dropin import logs, resuming, settings
from kiop_fast.dropin.flags import parse, script_name
from kiop_fast.dropin.measure import measure
from kiop_fast.dropin.methods import use_method
from kiop_fast.dropin.pth import checkpoint_of
from kiop_fast.dropin.replay import replay_mappings
from kiop_fast.errors import ConfigError
from kiop_fast.pipeline import RunResult, train
from kiop_fast.run import Run
from kiop_fast.runtime.device import choose_device
from kiop_fast.runtime.progress import Progress
from kiop_fast.sources import Sources, load_sources
from kiop_fast.tasks import Task

SUFFIXES = ("", "_tea", "_son")  # of B's, A's and a third model's numbers in a log line


def run_upstream(
    script: str, arguments: Sequence[str], progress: Progress | None = None
) -> RunResult | None:
    """Run a script's command line.

    Args:
        script: ``KiOP_BF``, ``KiOP_B`` or ``KiOP_triple``, with or without ``.py``.
        arguments: its flags.
        progress: as for :func:`kiop_fast.train`.

    Returns:
        What the run left behind; None with ``--evaluate_only``.

    Raises:
        ConfigError: unknown or contradictory flags.
        SourceError: no checkpoint (every path looked at is named), or one that does not fit.
        DataError: an unknown dataset, or one that is not below ``--data_root``.
    """
    script = script_name(script)
    flags, notes = parse(script, arguments)
    shown = dict(vars(flags), log_tag=logs.tag(flags))
    if flags.seed is None:
        flags.seed = secrets.randbelow(2**31)
    with data_root(flags.data_root):
        job = Job(script, flags)
        try:
            for key, value in shown.items():
                job.log.info("%s: %s", key, value)
            for note in notes:
                job.log.info("note: %s", note)
            if not flags.evaluate_only:
                return job.train(progress)
            job.evaluate_only()
            return None
        finally:
            logs.close_log(job.log)


@contextmanager
def data_root(root: str) -> Iterator[None]:
    """Inside, datasets are read from ``ROOT/torchdata``, where the scripts keep them."""
    before = os.environ.get("KIOP_FAST_DATA")
    os.environ["KIOP_FAST_DATA"] = str(Path(root).expanduser() / "torchdata")
    forget_test_data()
    try:
        yield
    finally:
        forget_test_data()
        if before is None:
            del os.environ["KIOP_FAST_DATA"]
        else:
            os.environ["KIOP_FAST_DATA"] = before


class Job:
    """One command line at work.

    Attributes:
        config, sources: what runs.
        mappings: one a provider.
        log: the scripts' logger.
        best: best accuracy of B's task so far, percent.
    """

    def __init__(self, script: str, flags: Namespace) -> None:
        self.script, self.flags = script, flags
        settings.check(script, flags)
        counts = settings.class_counts(flags)
        specs = settings.source_specs(script, flags)
        self.config = settings.run_config(script, flags, specs)
        self.resumed = resuming.find(flags)
        device = choose_device(self.config.device)
        self.sources: Sources = load_sources(self.config, self.config.prompt.rings, device, None)
        for source in (self.sources.target, *self.sources.providers):
            read_test(source.info, self.config.side)  # missing data shows now, not after an epoch
        kept = self.resumed.mappings if self.resumed else None
        self.mappings: list[Tensor] = kept or replay_mappings(script, flags, counts)
        self.best = self.resumed.best if self.resumed else 0.0
        self.folder = logs.folder(flags)
        self.log = logs.open_log(flags)
        self.out: Path | None = None
        self._written: dict[str, int] = {}

    def train(self, progress: Progress | None) -> RunResult:
        """All epochs; the run folder lies beside the log."""
        flags = self.flags
        base = self.folder / f"run-{logs.names(flags)}{logs.tag(flags)}"
        self.out, again = resuming.run_folder(self, base)
        self._refuse_old_images(again)
        result = train(
            self.config, self.out, sources=self.sources, resume=again, progress=progress,
            prepare=self.prepare, on_epoch=self.on_epoch,
        )  # fmt: skip
        self.log.info("Best: %.4f", self.best)
        self.log.info("run folder: %s", self.out)
        return result

    def evaluate_only(self) -> None:
        """Accuracy of B's task, of the resumed prompt or of one that has learned nothing."""
        run = Run(self.config, self.sources, choose_device(self.config.device), self.folder)
        self.prepare(run)
        if self.resumed:
            resuming.give(run, self.resumed)
        found = self.numbers(run, self.of_providers(run)[0], 0)
        print(f"[Eval] Acc={found['top1']:.4f}")

    def prepare(self, run: Run) -> None:
        """What the flags ask of a new run, before anything is computed."""
        for task, mapping in zip(self.of_providers(run), self.mappings, strict=True):
            task.mapping = mapping.to(run.device)
        use_method(self.flags, run)
        if self.flags.cmi_init:
            add_images(run, Path(self.flags.cmi_init))
        self._written = {task.name: len(task.bank) for task in run.tasks}

    def on_epoch(self, run: Run, metrics: dict[str, Any], timings: dict[str, Any]) -> None:
        """Log lines, pictures and the ``.pth`` of an epoch."""
        epoch, flags = metrics["epoch"] - 1, self.flags
        lr = run.optimizer.param_groups[0]["lr"]
        if flags.print_freq > 0 and run.log is not None:
            for line in logs.train_lines(epoch, run.log, flags.print_freq, lr,
                                         own=run.tasks[0].synthesizer is not None):  # fmt: skip
                self.log.info(line)
        self._pictures(run)
        found = self._evaluate(run, epoch)
        self.log.info(logs.eval_line(epoch, found, lr))
        tasks = dict(zip(SUFFIXES, self._in_their_order(run), strict=False))
        metrics["accuracy"] = {tasks[end].name: found[end]["top1"] / 100 for end in found}
        if found[""]["top1"] > self.best:
            self.best = found[""]["top1"]
            path = self.folder / f"{logs.names(flags)}.pth"
            checkpoint_of(self, run, epoch + 1).write(path)

    def of_providers(self, run: Run) -> list[Task]:
        """B's task and those after it."""
        return [task for task in run.tasks if task.source is not run.sources.target]

    def _in_their_order(self, run: Run) -> list[Task]:
        """B, A, and a third model."""
        first, *others = self.of_providers(run)
        return [first, run.tasks[0], *others]

    def _evaluate(self, run: Run, epoch: int) -> dict[str, dict[str, float]]:
        tasks = zip(SUFFIXES, self._in_their_order(run), strict=False)
        return {end: self.numbers(run, task, epoch) for end, task in tasks}

    def numbers(self, run: Run, task: Task, epoch: int) -> dict[str, float]:
        """Accuracies and loss of a task through the prompt as it stands."""
        seen = run.prompted(task, "evaluate", epoch)
        return measure(seen, task.source, self.config.side, self.flags.batch_size, run.device)

    def _save_folders(self, run: Run) -> dict[str, Path]:
        """Where each task's PNGs go; none for methods that keep no pool of images."""
        if self.flags.method in settings.GENERATIVE:
            return {}
        tasks = [task for task in self._in_their_order(run) if task.synthesizer is not None]
        paths = settings.save_folders(self.script, self.flags)
        return {task.name: path for task, path in zip(tasks, paths, strict=True)}

    def _pictures(self, run: Run) -> None:
        batch = self.config.synthesis.batch
        first = self.of_providers(run)[0]
        for task in run.tasks:
            path, old = self._save_folders(run).get(task.name), self._written[task.name]
            if path is not None:
                given = old - self._first_image(task)
                logs.write_pngs(task.bank.images[old:], path, given, batch)
            self._written[task.name] = len(task.bank)
        sheet = self.folder / f"synthetic{logs.tag(self.flags)}.png"
        logs.write_grid(first.bank.images[-batch:], sheet)

    def _first_image(self, task: Task) -> int:
        """Images at the head of a bank that came from ``--cmi_init``."""
        return getattr(task.bank, "given", 0)

    def _refuse_old_images(self, again: bool) -> None:
        if self.flags.method in settings.GENERATIVE or again or self.resumed:
            return
        for path in settings.save_folders(self.script, self.flags):
            if any(path.glob("*.png")):
                raise ConfigError(
                    "the folder for synthetic images holds images of an earlier run",
                    got=path, expected="an empty or new folder (the scripts would mix them in)",
                    fix="delete it, or choose another --save_dir",
                )  # fmt: skip


def add_images(run: Run, folder: Path) -> None:
    """Put the images of ``--cmi_init`` in front of every synthetic bank.

    Raises:
        ConfigError: the folder holds no image.
    """
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix in {".png", ".jpg", ".jpeg", ".JPEG"})
    if not files:
        raise ConfigError("--cmi_init names a folder of images", got=f"none in {folder}",
                          expected="png or jpeg files", fix="check the path")  # fmt: skip
    side = run.config.side
    for task in (task for task in run.tasks if task.synthesizer is not None):
        channels = task.bank.images.shape[1]
        kind = "L" if channels == 1 else "RGB"
        rows = []
        for file in files:
            picture = Image.open(file).convert(kind).resize((side, side))
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            rows.append(pixels.view(side, side, channels).permute(2, 0, 1))
        images = torch.stack(rows)
        with torch.no_grad():
            shown = images.to(run.device, torch.get_default_dtype()) / 255
            if channels == 1 or task.source.info.channels == 1:
                shown = shown.mean(dim=1, keepdim=True)
            labels = task.source.model(task.source.normalise(shown)).argmax(dim=1)
        task.bank.add(images, labels)
        task.bank.given = len(images)
