"""The authors' ``CMISynthesizer`` with our synthesize period inside.

Its methods are exchanged: same constructor, attributes and return values.  What our period cannot
do (other feature layers, other generators, grey images, distributed sampling) runs as theirs,
after a warning that says why.  Random numbers come from torch's global generator, as theirs do,
but not in their order; ``draw`` and ``order`` let a caller feed recorded ones.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.dropin.fast_pool import Batches, add_pixels, pixels_of
from kiop_fast.engine import engine
from kiop_fast.errors import SourceError
from kiop_fast.kernels import views
from kiop_fast.runtime.execution import AS_SET, Execution
from kiop_fast.source import Source, batchnorm_layers
from kiop_fast.synthesize import Generator, SynthesisDraws, draw_synthesis

Draw = Callable[[Any, Tensor | None], SynthesisDraws]
Order = Callable[[Any, int], Tensor]
# A graph may not be able to hold the student, which is foreign code; precision is the script's.
NO_GRAPHS = Execution(AS_SET, graphs=False)
_OWN = {"feature_layers", "head_dim", "generator"}  # arguments that do not become attributes


@dataclass(frozen=True)
class Parts:
    """What the accelerated class needs from the checkout.

    Attributes:
        kind: their class.
        version: KiOP (``synthesize`` returns a triple) or CMI (a dict).
        pool: their image pool, accelerated.
        unlabeled: their dataset of a folder of images, for ``init_dataset``.
        count: calls of ours by name.
        draw: makes the draws of a call from (synthesizer, targets); None for our own.
        order: makes the order of a pool from (synthesizer, count); None for ``torch.randperm``.
    """

    kind: Any
    version: str
    pool: Any
    unlabeled: Any
    count: Counter[str]
    draw: Draw | None = None
    order: Order | None = None


def fast_synthesizer(parts: Parts) -> dict[str, Any]:
    """Methods for ``CMISynthesizer``."""
    plain_init, plain_synthesize = parts.kind.__init__, parts.kind.synthesize
    names = inspect.signature(plain_init)

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        bound = names.bind(self, *given, **named)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        reason = reason_against(values)
        if reason:
            warnings.warn(f"this CMISynthesizer runs as it was: {reason}", stacklevel=2)
            plain_init(self, *given, **named)
            return
        for name, value in values.items():
            if name not in _OWN:
                setattr(self, name, value)
        period = self._period = Period(values)
        print(f"CMI dims: {period.system.features.rows.shape[1] // 2}")
        self.generator = values["generator"]
        self.data_pool, self.data_iter = parts.pool(root=self.save_dir), None
        self.hooks, self.cmi_hooks = [], []
        self.head, self.optimizer_head = period.system.head, period.system.head_optimizer
        self.mem_bank, self.aug = MemoryBank(period.system.features), period.views
        self._look = lambda images: self.student(images)

    def synthesize(self: Any, targets: Tensor | None = None) -> Any:
        period: Period | None = self.__dict__.get("_period")
        if period is None:
            return plain_synthesize(self, targets)
        parts.count["CMISynthesizer.synthesize"] += 1
        self.student.eval()
        self.teacher.eval()
        drawn = parts.draw(self, targets) if parts.draw else period.draw(targets)
        with constant(self.teacher, self.student):
            result = period.system.synthesize(drawn, self._look, None)
        self.student.train()
        self.losses = result.losses
        add_pixels(self.data_pool, result.images.cpu())
        extra = None
        if self.init_dataset is not None:
            extra = parts.unlabeled(self.init_dataset, transform=self.transform)
        order = None
        if parts.order is not None:
            order = partial(parts.order, self)
        self.data_iter = Batches(pixels_of(self.data_pool), self.transform,
                                 self.sample_batch_size, period.device, extra, order)  # fmt: skip
        # Half a grey level up: what truncates to the stored byte again.
        best = (result.images.to(period.device, torch.get_default_dtype()) + 0.5) / 255
        if parts.version == "CMI":
            return {"synthetic": best}
        seen = period.global_view(best, drawn, result.best_step)
        return {"synthetic": best}, seen, drawn.targets.to(period.device)

    return {"__init__": __init__, "synthesize": synthesize}


class Period:
    """Our synthesize period for one pair of models.

    Attributes:
        system: the engine's synthesizer.
        device: where it computes.
        calls: how many calls were drawn.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        teacher: nn.Module = given["teacher"]
        side, size = given["img_size"][-1], [p.shape for p in given["generator"].parameters()]
        self.device = _device(given["device"], teacher)
        self.config = SynthesisConfig(
            batch=given["synthesis_batch_size"], steps=given["iterations"], lr=given["lr_g"],
            latent=given["nz"], width=size[-2][1], bn=float(given["bn"]), oh=float(given["oh"]),
            adv=float(given["adv"]), cr=float(given["cr"]), cr_temperature=float(given["cr_T"]),
            head_dim=given["head_dim"], negatives=given["n_neg"], bank_rows=given["bank_size"],
            grey=False,
        )  # fmt: skip
        normalizer = given["normalizer"]
        mean, std = ((tuple(float(v) for v in values) * 3)[:3] if len(values) == 1
                     else tuple(float(v) for v in values)
                     for values in (normalizer.mean, normalizer.std))  # fmt: skip
        classes = tuple(map(str, range(given["num_classes"])))
        info = DatasetInfo("images", side, 3, classes, mean, std)  # type: ignore[arg-type]
        self.source = Source("teacher", type(teacher).__name__, teacher, info, "")
        self.side, self.calls = side, 0
        for model in (teacher, given["student"]):  # strides alone change
            model.to(memory_format=torch.channels_last)
        self.system = engine("fast").synthesizer(
            self.source, self.config, info, side=side, bank_rows=given["bank_size"],
            seed=_seed(), task="cmi", device=self.device, execution=NO_GRAPHS,
        )  # fmt: skip

    def draw(self, targets: Tensor | None) -> SynthesisDraws:
        """Fresh draws of a call, named by a number from torch's global generator."""
        self.calls += 1
        drawn = draw_synthesis(
            self.config, self.source, self.side, seed=_seed(), epoch=self.calls, task="cmi",
            call=0, stored=self.system.features.stored,
        )  # fmt: skip
        return drawn if targets is None else replace(drawn, targets=targets.cpu().long())

    def views(self, images: Tensor) -> list[Tensor]:
        """Two fresh random views of images in [0, 1]: global, local; normalised."""
        drawn = self.draw(None).views
        return list(self._views(images, drawn, 0).chunk(2))

    def global_view(self, images: Tensor, drawn: SynthesisDraws, step: int) -> Tensor:
        """The global view of ``images`` as step ``step`` saw them."""
        return self._views(images, drawn.views, step)[: len(images)]

    def _views(self, images: Tensor, drawn: Any, step: int) -> Tensor:
        tables = (drawn.crop, drawn.crop_flip, drawn.box, drawn.box_flip)
        rows = [table[step].to(images.device) for table in tables]
        info = self.source.info
        return views(images, *rows, pad=self.config.pad,
                     mean=torch.tensor(info.mean, device=images.device),
                     std=torch.tensor(info.std, device=images.device))  # fmt: skip


class MemoryBank:
    """Our feature bank with the attributes of the scripts' one."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.max_size, self.dim_feat = bank.rows.shape

    @property
    def data(self) -> Tensor:
        """(max_size, dim_feat)."""
        rows: Tensor = self.bank.rows
        return rows

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.data.device

    @property
    def n_updates(self) -> int:
        """Rows ever added."""
        return int(self.bank.added)

    @property
    def _ptr(self) -> int:
        return self.n_updates % self.max_size

    def add(self, feat: Tensor) -> None:
        """Add (n, dim_feat) rows."""
        self.bank.add(feat.detach())

    def get_data(
        self, k: int | None = None, index: list[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """``k`` stored rows without replacement (or those at ``index``), and where they lie."""
        if index is None:
            stored = self.bank.stored
            index = torch.randperm(stored)[: min(k or stored, stored)].tolist()
        return self.data[index], index


def reason_against(given: dict[str, Any]) -> str:
    """Why our period cannot do what is asked; empty if it can."""
    size, normalizer = given["img_size"], given["normalizer"]
    if given["feature_layers"] is not None:
        return "feature_layers are given"
    if given["distributed"]:
        return "distributed sampling"
    if len(size) != 3 or size[0] != 3 or size[1] != size[2] or size[1] % 4:
        return f"images of {tuple(size)}"
    if not hasattr(normalizer, "mean") or not hasattr(normalizer, "std"):
        return "a normalizer without mean and std"
    try:
        layers = batchnorm_layers(given["teacher"])
    except SourceError:
        return "a teacher without BatchNorm"
    if len(layers) < sum(isinstance(m, nn.BatchNorm2d) for m in given["teacher"].modules()):
        return "a teacher with BatchNorm layers without running statistics"
    shapes = [tuple(p.shape) for p in given["generator"].parameters()]
    if len(shapes) < 2 or len(shapes[-2]) != 4:
        return "another generator"
    with torch.device("meta"):
        ours = Generator(given["nz"], shapes[-2][1], size[1], 3)
    if shapes != [tuple(p.shape) for p in ours.parameters()]:
        return "another generator"
    return ""


@contextmanager
def constant(*models: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the models takes a gradient."""
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _seed() -> int:
    """A number from torch's global generator: ``torch.manual_seed`` decides every draw."""
    return int(torch.randint(2**62, ()))


def _device(given: Any, teacher: nn.Module) -> torch.device:
    return next(teacher.parameters()).device if given is None else torch.device(given)
