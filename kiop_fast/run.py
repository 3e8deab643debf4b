"""The state of a run and what one epoch does to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.config import RunConfig
from kiop_fast.engine import engine
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.prompt.artefact import Artefact
from kiop_fast.remapping import remapping_on_step
from kiop_fast.runtime import draws
from kiop_fast.runtime.optimizers import set_rate, sgd
from kiop_fast.runtime.profile import OnStep, Profiles
from kiop_fast.runtime.progress import Progress
from kiop_fast.runtime.watch import check_finite, reporter
from kiop_fast.source import DropoutDraws
from kiop_fast.source.classifier import trainable_copy
from kiop_fast.sources import Sources
from kiop_fast.store import Term, draw_storing, learning_rate
from kiop_fast.synthesize import TERMS, draw_synthesis
from kiop_fast.tasks import Task, make_tasks


class Run:
    """Prompt (or, in mode ``vanilla``, student), tasks and optimiser of one run.

    Args:
        config: validated settings.
        sources: frozen models.
        device: where everything lives.
        scratch: folder for the reference engine's PNG store.
        inner: an earlier artefact whose rings stay inside as they are.
    """

    def __init__(
        self, config: RunConfig, sources: Sources, device: torch.device, scratch: Path,
        inner: Artefact | None = None,
    ) -> None:  # fmt: skip
        self.config, self.sources, self.device, self.inner = config, sources, device, inner
        self.engine = engine(config.engine)
        self.execution = self.engine.execution(config, device)
        if config.engine == "fast":
            # Strides alone change; a demo step on two CPU cores: synthesis 264 → 217 ms, storing
            # 116 → 81 ms (resnet8, 16², medians in one process).
            for source in (sources.target, *sources.providers):
                if not source.rowwise:
                    source.model.to(memory_format=torch.channels_last)
        inner_rings = inner.rings if inner else ()
        self.prompt: Prompt | None = None
        self.student: nn.Module | None = None
        self.log: Tensor | None = None  # (steps, 2 · tasks) of the last storing period
        if config.mode == "vanilla":
            rng = draws.generator(config.seed, 0, "student", "classifier")
            classes = sources.providers[0].classes
            self.student = trainable_copy(sources.target, classes, rng)
        else:
            self.prompt = Prompt(config.side, (*inner_rings, *config.prompt.rings)).to(device)
            for cells, given in zip(self.prompt.cells, inner.cells if inner else (), strict=False):
                cells.data.copy_(given)
        self.tasks = make_tasks(
            config, sources, self.engine, inner=inner, device=device, scratch=scratch,
            execution=self.execution,
        )  # fmt: skip
        self.trained = self._trained_parameters(len(inner_rings))
        for cells in self.prompt.cells if self.prompt else ():
            cells.requires_grad_(any(cells is trained for trained in self.trained))
        period = config.storing
        self.optimizer = sgd(self.trained, period.lr, period.momentum, period.weight_decay)
        self._seen: dict[str, Any] = {}
        self._storing: Any = None
        self.profiles: Profiles | None = None  # set it to have the first periods profiled

    def _trained_parameters(self, inner_rings: int) -> list[nn.Parameter]:
        if self.prompt is None:
            assert self.student is not None
            return list(self.student.parameters())
        deepest = max((task.depth for task in self.tasks), default=0)
        return list(self.prompt.cells)[inner_rings:deepest]

    def prompted(self, task: Task, period: str = "", epoch: int = 0) -> Any:
        """A seen through the rings of a task; with ``period`` as it is while training.

        One object for all epochs, unless dropout stays on with each epoch's own masks: a captured
        step is found again by it.
        """
        settings, seed = self.config.prompt, self.config.seed
        keep = bool(period and settings.dropout)
        if task.name in self._seen and not keep:
            return self._seen[task.name]
        seen = self.engine.prompted(
            self.sources.target, self.prompt, task.depth, task.mapping,
            batchnorm=settings.batchnorm,
            dropout=DropoutDraws(seed, epoch, f"{task.name}/{period}") if keep else None,
        )  # fmt: skip
        if not keep:
            self._seen[task.name] = seen
        return seen

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        """Inside, the prompt or student is a constant (and the student in eval mode)."""
        parameters = list((self.prompt or self.student).parameters())  # type: ignore[union-attr]
        for parameter in parameters:
            parameter.requires_grad_(False)
        if self.student is not None:
            self.student.eval()
        try:
            yield
        finally:
            for parameter in self.trained:
                parameter.requires_grad_(True)

    def _stage(self, turn: int, name: str) -> str:
        """``epoch i/n  NAME`` for the bars, with the round where an epoch has several."""
        epoch, turn = divmod(turn, self.config.rounds)
        which = f" (round {turn + 1}/{self.config.rounds})" if self.config.rounds > 1 else ""
        return f"epoch {epoch + 1}/{self.config.epochs}  {name}{which}"

    def synthesize(self, turn: int, progress: Progress | None) -> tuple[dict[str, float], Any]:
        """The synthesize period of every task.

        Args:
            turn: how many rounds (of synthesizing and storing) came before; names the draws.

        Returns:
            Loss terms at the chosen step, ``{task}.{term}``, mean over the calls; and per task
            the tensors to add to its bank on disk.
        """
        period, losses, made = self.config.synthesis, {}, {}
        epoch = turn // self.config.rounds
        for task in (task for task in self.tasks if epoch < task.epochs):
            task.enter()
            rows, results = [], []
            steps = [period.steps_of(turn, call) for call in range(period.calls)]
            for call in range(period.calls):
                drawn = draw_synthesis(
                    period, task.source, self.config.side, seed=self.config.seed, epoch=turn,
                    task=task.name, call=call, stored=task.synthesizer.features.stored,
                )  # fmt: skip
                if task.start is not None:
                    drawn = task.start.begin(drawn)
                on_step = reporter(progress, self._stage(turn, f"synthesize {task.name}"),
                                   sum(steps[:call]), sum(steps))  # fmt: skip
                with self._fixed():
                    result = task.synthesizer.synthesize(
                        drawn, self._student(task, turn, call), task.mapping,
                        self._watched(f"synthesize {task.name}", on_step),
                    )  # fmt: skip
                check_finite(result.losses, TERMS, epoch, task.name)
                if task.start is not None:
                    task.start.end(drawn, task.synthesizer.generator)
                task.bank.add(result.images, result.targets)
                rows.append(result.losses[result.best_step])
                results.append(result)
            mean = torch.stack(rows).mean(dim=0)
            losses.update({f"{task.name}.{t}": float(v) for t, v in zip(TERMS, mean, strict=True)})
            made[task.name] = {
                part: torch.cat([getattr(result, part) for result in results])
                for part in ("images", "targets", "features")
            }
        return losses, made

    def _watched(self, period: str, on_step: OnStep | None) -> OnStep | None:
        return on_step if self.profiles is None else self.profiles.watch(period, on_step)

    def _student(self, task: Task, epoch: int, call: int) -> Callable[[Tensor], Tensor]:
        if self.student is not None:
            return self.student
        prompted = self.prompted(task, f"synthesize {call}", epoch)
        logits: Callable[[Tensor], Tensor] = prompted.logits
        return logits

    def bank_images(self, task: Task) -> Tensor:
        """A task's bank, (M, 3, s, s) normalised with its own statistics.

        M is at most ``prompt.calibration_images``, evenly spaced over the bank.
        """
        most = self.config.prompt.calibration_images
        images = task.bank.spread(most)
        images = images.to(self.device, torch.get_default_dtype()) / 255
        if task.source.info.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        return task.source.normalise(images)

    def store(self, turn: int, progress: Progress | None) -> tuple[dict[str, float], ...]:
        """The knowledge storing period.

        Args:
            turn: as for :meth:`synthesize`; the learning rate changes with the epoch alone.

        Returns:
            Mean loss of every term, ``{task}.kl``; mean arg-max agreement of every task.
        """
        config = self.config.storing
        set_rate(
            self.optimizer,
            learning_rate(config, turn // self.config.rounds, self.config.epochs),
        )
        if self.student is not None:
            self.student.train()
        drawn = {
            task.name: draw_storing(
                config, task.source.info, len(task.bank),
                config.batch if task.synthesizer is not None else config.batch_real,
                seed=self.config.seed, epoch=turn, task=task.name,
            )
            for task in self.tasks
        }  # fmt: skip
        on_step = remapping_on_step(
            self, turn, reporter(progress, self._stage(turn, "store"), 0, config.steps)
        )
        if self._storing is None or self.config.prompt.dropout:
            self._storing = self.engine.storing(
                self._terms(turn), self.optimizer, config.steps, **self.execution
            )
        self.log = log = self._storing.run(drawn, self._watched("store", on_step))
        names, epoch = [task.name for task in self.tasks], turn // self.config.rounds
        check_finite(log[:, : len(names)], [f"{name}.kl" for name in names], epoch, "storing")
        mean = log.mean(dim=0).tolist()
        losses = {f"{name}.kl": mean[i] for i, name in enumerate(names)}
        agreement = {name: mean[len(names) + i] for i, name in enumerate(names)}
        return losses, agreement

    def _terms(self, epoch: int) -> list[Term]:
        config, engine = self.config.storing, self.engine
        terms = []
        for task in self.tasks:
            seen = None if self.student is not None else self.prompted(task, "store", epoch)
            if self.student is not None:
                loss = engine.vanilla_loss(self.student, task.source, config.temperature)
            elif task.mapping is None:
                loss = engine.core_loss(seen, config.temperature, config.target_of_a)
            else:
                loss = engine.provider_loss(
                    seen, task.source, config.temperature, config.target_of_b
                )
            grey = task.source.info.channels == 1
            terms.append(
                Term(task.name, task.weight, task.bank, task.source, grey, loss, task.feed)
            )
        return terms

    @torch.no_grad()
    def statistics(self, task: Task, prompt: Prompt) -> dict[str, Tensor] | None:
        """Calibrated BatchNorm statistics of a task; None under the other policies."""
        if self.config.prompt.batchnorm != "calibrated":
            return None
        seen = PromptedModel(self.sources.target, prompt, task.depth, task.mapping)
        return calibrate(seen, self.bank_images(task), self.config.prompt.calibration_batch)

    def delivered_prompt(self) -> Prompt:
        """The prompt as it is stored: cells rounded to fp16."""
        assert self.prompt is not None
        rounded = copy.deepcopy(self.prompt)
        for cells in rounded.cells:
            cells.data = cells.data.half().to(cells.dtype)
        return rounded.requires_grad_(False)
