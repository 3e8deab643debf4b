"""``--method`` other than cmi: DeepInversion, and generators trained against the student.

The scripts name deepinv (Yin et al. 2020), dafl (Chen et al. 2019), zskt (Micaelli & Storkey
2019), dfad (Fang et al. 2019) and dfq (Choi et al. 2020), and fail in all of them: arguments and
return values do not fit.  Here each does what its script meant: a synthesizer with the interface
of :class:`kiop_fast.synthesize.Synthesizer`, drawing from the run's named draws.

Two differences: the generators' methods add ``FRESH`` images a round to the bank, where the scripts
draw new ones in every prompt step; and dfad's L1 distance is used by its generator alone, the
prompt learns by KL.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.run import Run
from kiop_fast.runtime import draws
from kiop_fast.source import BatchNormTaps, Source
from kiop_fast.source.classifier import classifier_name
from kiop_fast.synthesize import FeatureBank, SynthesisDraws, Synthesised, quantise
from kiop_fast.tasks import synthesis_normaliser

FRESH = 1024  # images a round of the generators' methods
TV, JITTER, JS_T = 0.001, 8, 3.0  # deepinv: total variation, side / 8 pixels, temperature
Student = Callable[[Tensor], Tensor]


def use_method(flags: Namespace, run: Run) -> None:
    """Exchange the synthesizers of a new run's tasks; cmi is what a run has."""
    if flags.method == "cmi":
        return
    kind = DeepInversion if flags.method == "deepinv" else GeneratorGame
    for task in (task for task in run.tasks if task.synthesizer is not None):
        normaliser = synthesis_normaliser(run.config, run.sources, task.source)
        task.synthesizer = kind(flags, run, task.source, normaliser, task.name)
        task.tenant = None


class _NoOptimizer:
    """Stands where a run keeps an optimiser's state and there is none."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


class _Method:
    """What both kinds share.  ``head`` and ``head_optimizer`` are what a run saves of them."""

    def __init__(
        self, flags: Namespace, run: Run, teacher: Source, normaliser: DatasetInfo, name: str
    ) -> None:
        self.flags, self.config, self.teacher = flags, run.config.synthesis, teacher
        self.device, self.side = run.device, run.config.side
        self.mean = torch.tensor(normaliser.mean, device=run.device).view(3, 1, 1)
        self.std = torch.tensor(normaliser.std, device=run.device).view(3, 1, 1)
        self.head: nn.Module = nn.Module()
        self.head_optimizer: Any = _NoOptimizer()
        self.features = FeatureBank(1, 1, run.device)

    def _rng(self, drawn: SynthesisDraws) -> np.random.Generator:
        """A stream that belongs to this call: named by its drawn z."""
        digest = hashlib.blake2b(drawn.z.numpy().tobytes(), digest_size=8).hexdigest()
        return draws.generator(int(digest, 16), 0, self.flags.method, "method")

    def _teach(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits and its BatchNorm matching loss."""
        with BatchNormTaps(self.teacher.model) as taps:
            logits = self.teacher.model(images)
            return logits, taps.take()[0]

    def _result(
        self, images: Tensor, targets: Tensor, log: list[list[Tensor]], best: int
    ) -> Synthesised:
        rows = torch.stack([torch.stack([v.detach().reshape(()) for v in row]) for row in log])
        empty = torch.zeros(len(images), 2)
        return Synthesised(quantise(images), targets.cpu(), empty, rows.cpu(), best)


class DeepInversion(_Method):
    """The pixels are optimised: BatchNorm matching, class prior, disagreement, smoothness."""

    def synthesize(
        self, drawn: SynthesisDraws, student: Student, mapping: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Synthesised:  # fmt: skip
        config, rng = self.config, self._rng(drawn)
        shape = (config.batch, 3, self.side, self.side)
        x = draws.normal(rng, *shape).to(self.device).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=config.lr, betas=(0.5, 0.99))
        targets = drawn.targets.to(self.device)
        low, high = -self.mean / self.std, (1 - self.mean) / self.std
        log: list[list[Tensor]] = []
        best, best_step, kept = torch.inf, 0, x.detach().clone()
        reach = self.side // JITTER
        for step in range(config.steps):
            down, right = (int(v) for v in rng.integers(-reach, reach + 1, 2))
            seen = x.roll((down, right), (2, 3))
            seen = seen.flip(3) if rng.random() < 0.5 else seen
            logits, bn = self._teach(seen)
            oh, adv = F.cross_entropy(logits, targets), bn.new_zeros(())
            if config.adv:
                adv = -_js(_mapped(student(seen), mapping), logits)
            total = config.bn * bn + config.oh * oh + config.adv * adv + TV * _variation(x)
            log.append([bn, oh, adv, torch.zeros_like(bn), total])
            if total.item() < best:
                best, best_step, kept = total.item(), step, x.detach().clone()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, low), high))
            if on_step is not None:
                on_step(step + 1, total.detach())
        return self._result(kept * self.std + self.mean, targets, log, best_step)


class GeneratorGame(_Method):
    """A generator that persists and plays against the student (dafl, zskt, dfad, dfq)."""

    def __init__(self, flags: Namespace, run: Run, *rest: Any) -> None:
        super().__init__(flags, run, *rest)
        name = rest[-1]
        seed = draws.generator(run.config.seed, 0, name, "large generator").integers(2**62)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            self.head = large_generator(self.config.latent, self.config.width, self.side)
        self.head.to(self.device)
        self.head_optimizer = torch.optim.Adam(
            self.head.parameters(), lr=self.config.lr, betas=(0.5, 0.999)
        )

    def synthesize(
        self, drawn: SynthesisDraws, student: Student, mapping: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Synthesised:  # fmt: skip
        config, rng = self.config, self._rng(drawn)
        log: list[list[Tensor]] = []
        self.head.train()
        for step in range(config.steps):
            z = draws.normal(rng, config.batch, config.latent).to(self.device)
            terms = self._terms((self.head(z) - self.mean) / self.std, student, mapping)
            log.append(terms)
            self.head_optimizer.zero_grad()
            terms[-1].backward()
            self.head_optimizer.step()
            if on_step is not None:
                on_step(step + 1, terms[-1].detach())
        count = min(FRESH, self.flags.kd_steps * self.flags.batch_size)
        with torch.no_grad():
            z = draws.normal(rng, count, config.latent).to(self.device)
            images = self.head.eval()(z)
            targets = self.teacher.model((images - self.mean) / self.std).argmax(dim=1)
        return self._result(images, targets, log, config.steps - 1)

    def _terms(self, images: Tensor, student: Student, mapping: Tensor | None) -> list[Tensor]:
        config, flags = self.config, self.flags
        layer = self.teacher.model.get_submodule(classifier_name(self.teacher.model))
        inputs: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        try:
            logits, bn = self._teach(images)
        finally:
            hook.remove()
        oh, adv = F.cross_entropy(logits, logits.argmax(dim=1)), bn.new_zeros(())
        if config.adv:
            theirs = _mapped(student(images), mapping)
            adv = -(F.l1_loss(theirs, logits) if flags.method == "dfad" else _kl(theirs, logits))
        share = logits.softmax(dim=1).mean(dim=0)
        balance, act = (share * share.log()).sum(), -inputs[0].abs().mean()
        total = config.bn * bn + config.oh * oh + config.adv * adv
        total = total + flags.balance * balance + flags.act * act
        return [bn, oh, adv, torch.zeros_like(bn), total]


def large_generator(latent: int, width: int, side: int) -> nn.Module:
    """z (N, latent) → images (N, 3, side, side) in [0, 1]; 4·width, 2·width, width channels."""
    seed = side // 4
    return nn.Sequential(
        nn.Linear(latent, 4 * width * seed * seed), nn.Unflatten(1, (4 * width, seed, seed)),
        nn.BatchNorm2d(4 * width), nn.Upsample(scale_factor=2),
        nn.Conv2d(4 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def _mapped(logits: Tensor, mapping: Tensor | None) -> Tensor:
    return logits if mapping is None else logits[:, mapping]


def _kl(logits: Tensor, targets: Tensor) -> Tensor:
    log_q, log_p = logits.log_softmax(dim=1), targets.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _js(logits: Tensor, targets: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two batches of logits at temperature ``JS_T``, a row."""
    log_p, log_q = (logits / JS_T).log_softmax(dim=1), (targets / JS_T).log_softmax(dim=1)
    middle = torch.logaddexp(log_p, log_q) - np.log(2.0)
    both = [F.kl_div(middle, log, reduction="batchmean", log_target=True) for log in (log_p, log_q)]
    return 0.5 * (both[0] + both[1])


def _variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours across, down and along both diagonals."""
    pairs = [
        (x[..., :, :-1], x[..., :, 1:]), (x[..., :-1, :], x[..., 1:, :]),
        (x[..., 1:, :-1], x[..., :-1, 1:]), (x[..., :-1, :-1], x[..., 1:, 1:]),
    ]  # fmt: skip
    return torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()
