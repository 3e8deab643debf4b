"""One knowledge storing period: the prompt learns from the banks (paper section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kiop_fast.runtime import optimizers
from kiop_fast.runtime.execution import PLAIN, Execution
from kiop_fast.runtime.heap import kept_heap
from kiop_fast.runtime.profile import stage
from kiop_fast.runtime.static_step import Scratch, StaticStep
from kiop_fast.store.draws import StoringDraws
from kiop_fast.store.replay import Replay
from kiop_fast.store.terms import Term


class Storing:
    """The prompt step over tensors that stay where they are, kept from epoch to epoch.

    Args:
        terms: the summands of the transfer loss.
        optimizer: SGD over what is trained: the ring cells, or (mode ``vanilla``) a model, whose
            buffers move too.
        steps: prompt steps a period.
        execution: precision and graphs.
    """

    def __init__(
        self, terms: Sequence[Term], optimizer: torch.optim.Optimizer, steps: int,
        execution: Execution = PLAIN,
    ) -> None:  # fmt: skip
        self.terms, self.optimizer, self.execution = tuple(terms), optimizer, execution
        self._learned = [p for group in optimizer.param_groups for p in group["params"]]
        like = self._learned[0]
        self.device = like.device
        self.at = torch.zeros((), dtype=torch.int64, device=like.device)
        self.totals = like.new_zeros(steps)
        self.log = like.new_zeros(steps, 2 * len(terms))
        self._weights = like.new_tensor([term.weight for term in terms])
        self._replays = [Replay(term, like.dtype, like.device) for term in terms]
        learners = {getattr(term.loss, "learner", None) for term in terms}
        models = [learner for learner in learners if isinstance(learner, nn.Module)]
        self._buffers = [buffer for model in models for buffer in model.buffers()]
        self._runs: dict[object, StaticStep] = {}
        self._scratch = execution.scratch or Scratch(like.device)

    @property
    def captures(self) -> int:
        """CUDA graphs made so far."""
        return sum(run.captures for run in self._runs.values())

    def run(
        self,
        drawn: Mapping[str, StoringDraws],
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """One period.

        Args:
            drawn: each term's batches, by its name.
            on_step: called with the number of finished steps and the total loss (a tensor).

        Returns:
            (steps, 2 · len(terms)): each term's unweighted loss, then each term's share of rows
            whose arg-max agrees.
        """
        self.at.zero_()
        with kept_heap(self.device):
            self._period(drawn, on_step)
        return self.log.cpu()

    def _period(
        self, drawn: Mapping[str, StoringDraws], on_step: Callable[[int, Tensor], None] | None
    ) -> None:
        with self.execution.products(self.device), self.execution.autocast(self.device):
            for replay in self._replays:
                replay.begin(drawn[replay.term.name])
        step: StaticStep | None = None
        for done in range(1, len(self.log) + 1):
            for replay in self._replays:
                replay.fetch()
            step = step or self._step()  # found by where the first batch was put
            step()
            if on_step is not None:
                on_step(done, self.totals[done - 1])
        for replay in self._replays:
            replay.end()

    def _step(self) -> StaticStep:
        """The step over what the banks' readers hold now."""
        held = tuple(replay.held for replay in self._replays)
        if held not in self._runs:
            self._runs[held] = StaticStep(
                self._move, self._state, self.device, self.execution.graphs, self._scratch
            )
        return self._runs[held]

    def _state(self) -> list[Tensor]:
        moments = optimizers.state_tensors(self.optimizer)
        return [*self._learned, *self._buffers, *moments, self.at]

    def _move(self) -> None:
        with self.execution.products(self.device, search=True):
            self._moved()

    def _moved(self) -> None:
        results = []
        with self.execution.autocast(self.device):
            for replay in self._replays:
                with stage("bank replay"):
                    batch = replay.batch(self.at)
                results.append(replay.term.loss(*batch))
        losses = torch.stack([result.loss for result in results])
        total = (losses * self._weights).sum()
        rows = [replay.rows for replay in self._replays]
        shares = [result.agreement / n for result, n in zip(results, rows, strict=True)]
        with torch.no_grad():
            self.totals.index_copy_(0, self.at.view(1), total.view(1).to(self.totals))
            row = torch.cat([losses, torch.stack(shares).to(losses)])
            self.log.index_copy_(0, self.at.view(1), row.to(self.log)[None])
            self.at.add_(1)
        with stage("backward"):
            optimizers.set_gradients(total, self._learned)
        with stage("optimisers"):
            optimizers.step(self.optimizer)


def store(
    terms: Sequence[Term],
    drawn: Mapping[str, StoringDraws],
    optimizer: torch.optim.Optimizer,
    steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
    execution: Execution = PLAIN,
) -> Tensor:
    """One period on its own; arguments and result as in :class:`Storing`."""
    return Storing(terms, optimizer, steps, execution).run(drawn, on_step)
