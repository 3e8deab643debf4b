"""What is measured: one problem a benchmark, at the sizes of the paper or small ones for a CPU."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kiop_fast.config import RunConfig
from kiop_fast.config_io import override


@dataclass(frozen=True)
class Problem:
    """Everything that decides the numbers of a step, so that equal digests may be compared.

    Attributes:
        config: rings, batch, generator, head, losses; its engine says nothing here.
        arch: architecture of all models, whose weights are drawn, not trained.
        classes: of the target and of each provider.
        cached: rows in the feature bank before a call (the negatives of a step).
        bank: images in each image bank before a storing period.
    """

    config: RunConfig
    arch: str
    classes: tuple[int, ...]
    cached: int
    bank: int

    def digest(self) -> str:
        """Twelve hexadecimal digits; the same for every engine."""
        plain = asdict(replace(self, config=replace(self.config, engine="reference")))
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

    def with_(
        self, *, cached: int | None = None, bank: int | None = None, **changes: Any
    ) -> Problem:
        """The same with other settings (nested, as ``override`` takes them)."""
        return replace(
            self,
            config=override(self.config, changes),
            cached=self.cached if cached is None else cached,
            bank=self.bank if bank is None else bank,
        )


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of the benchmarks.

    Attributes:
        problem: the plain one.
        cached: sizes of the feature bank at which synthesis is timed.
        rounds: timed calls of a period.
        seconds: timed at most, a kernel.
        data_bank: images of the data paths.
        info_nce_rows: queries and keys of that operation.
        demo: settings of the shortened demo.
    """

    name: str
    problem: Problem
    cached: tuple[int, ...]
    rounds: int
    seconds: float
    data_bank: int
    info_nce_rows: int
    demo: dict[str, Any] = field(default_factory=dict)


def scale(name: str, *, gpu: bool) -> Scale:
    """``small`` ends in minutes on two cores; ``paper`` is the setting of the authors' scripts."""
    return _small() if name == "small" else _paper(gpu=gpu)


def _small() -> Scale:
    # Eight storing steps go through the bank once: the reference's loader starts once in them.
    problem = _problem("resnet8", (26, 10), 16, (20, 32), width=32, steps=4, storing=8, bank=512)
    return Scale(
        "small", problem, cached=(0, 256), rounds=3, seconds=0.2, data_bank=1024,
        info_nce_rows=320,
        demo={"epochs": 1, "synthesis": {"steps": 12, "batch": 64}, "storing": {"steps": 20}},
    )  # fmt: skip


def _paper(*, gpu: bool) -> Scale:
    steps, storing = (20, 40) if gpu else (2, 4)
    problem = _problem("resnet18", (100, 10), 32, (36, 128), width=64, steps=steps,
                       storing=storing, bank=4096)  # fmt: skip
    return Scale(
        "paper", problem, cached=(0, 256, 4096), rounds=3, seconds=0.3,
        data_bank=4096, info_nce_rows=4160, demo={"epochs": 2},
    )  # fmt: skip


def _problem(
    arch: str, classes: tuple[int, ...], side: int, rings: tuple[int, ...], *, width: int,
    steps: int, storing: int, bank: int,
) -> Problem:  # fmt: skip
    config = override(RunConfig(), {
        "side": side, "prompt": {"rings": list(rings)},
        "synthesis": {"width": width, "steps": steps, "pad": 4 if side == 32 else 1},
        "storing": {"steps": storing},
    })  # fmt: skip
    return Problem(config, arch, classes, 0, bank)
