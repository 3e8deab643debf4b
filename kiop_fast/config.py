"""Settings of a run: frozen dataclasses, one a stage, validated on construction, never changed.

Presets live in :mod:`kiop_fast.presets`; reading and writing in :mod:`kiop_fast.config_io`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kiop_fast.errors import ConfigError, unknown_name

MODES = ("bf", "b", "t", "vanilla")
ENGINES = ("fast", "reference")
PRECISIONS = ("fp32", "bf16x3", "tf32", "bf16")
MAPPINGS = ("random", "frequency", "iterative", "likelihood")
LOADERS = ("auto", "dali", "torch")
BATCHNORM_POLICIES = ("calibrated", "batch", "running")


def _require(ok: bool, what: str, got: object, expected: str) -> None:
    if not ok:
        raise ConfigError(what, got=got, expected=expected, fix="change that setting")


def _choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise unknown_name(f"value for {name}", value, choices, ConfigError)


@dataclass(frozen=True)
class PromptConfig:
    """The prompt, its label mapping and how A's BatchNorm layers see it (SPEC 2, 3, 7)."""

    rings: tuple[int, ...] = (36, 128)  # side of the canvas after each ring, pixels
    mapping: str = "random"  # random | frequency | iterative | likelihood
    mapping_steps: int = 0  # prompt steps until it is made anew; 0: not within a storing period
    disjoint: bool = False  # several providers: mappings share no class of A (upstream)
    batchnorm: str = "calibrated"  # calibrated | batch | running
    calibration_batch: int = 256  # images a forward pass while statistics are estimated
    calibration_images: int = 10_000  # at most so many, evenly spaced
    dropout: bool = False  # A's dropout layers stay on while training (upstream's VGG)
    extend: str = ""  # a prompt file whose rings stay as they are; new rings go around them

    def __post_init__(self) -> None:
        _require(len(self.rings) >= 1, "a prompt needs at least one ring", self.rings, "sizes")
        inner_first = all(a < b for a, b in itertools.pairwise(self.rings))
        _require(inner_first, "rings must grow outwards", list(self.rings), "increasing sides")
        _choice("prompt.mapping", self.mapping, MAPPINGS)
        _choice("prompt.batchnorm", self.batchnorm, BATCHNORM_POLICIES)
        if self.disjoint and self.mapping != "random":
            raise ConfigError(
                "only random mappings can be disjoint: the others look at one provider at a time",
                got=f"prompt.disjoint=true, prompt.mapping={self.mapping}",
                expected="prompt.mapping=random",
                fix="change either setting",
            )
        _require(self.mapping_steps >= 0, "prompt.mapping_steps", self.mapping_steps, "0 or more")
        for name in ("calibration_batch", "calibration_images"):
            value = getattr(self, name)
            _require(value >= 1, f"prompt.{name} is too small", value, "at least 1")


@dataclass(frozen=True)
class SynthesisConfig:
    """One synthesize period: contrastive model inversion (SPEC 4; paper eqs. 2-4)."""

    batch: int = 64  # images a call
    calls: int = 1  # calls a task and epoch
    epochs: int = 0  # epochs that synthesize, then the banks stay; 0: all
    epochs_of_a: int = 0  # the same for A's own task alone; 0: as the others
    steps: int = 200  # generator steps a call (paper's rounds, upstream --g_steps)
    start: str = "fresh"  # fresh (paper) | meta: where a call's generator starts
    meta_steps: int = 0  # steps of a call that starts so, at most; 0: as the others
    meta_rate: float = 1.0  # of the way to what a call learned, that the start moves
    lr: float = 0.01  # Adam, generator, latent and head (upstream --lr_g)
    beta1: float = 0.5
    beta2: float = 0.999
    latent: int = 256  # width of z
    width: int = 64  # generator channels (ngf)
    bn: float = 1.0  # weight of BatchNorm matching
    oh: float = 1.0  # weight of the one-hot (cross-entropy) term
    adv: float = 0.5  # weight of the adversarial term
    cr: float = 0.8  # weight of the contrastive term; 0 leaves it out
    cr_temperature: float = 0.6
    head_width: int = 0  # hidden width of the projection head; 0: as wide as its input
    head_dim: int = 256  # output width of the projection head
    negatives: int = 4096  # cached rows a step
    bank_rows: int = 40960  # feature-bank capacity, rows
    pad: int = 4  # zero padding of the global view, pixels
    scale: tuple[float, float] = (0.25, 1.0)  # area of the local view's box, fractions
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)  # aspect ratio of that box
    flip: float = 0.5  # probability of a horizontal flip, both views
    balanced: bool = False  # targets as even as possible instead of uniform draws
    grey: bool = True  # grey data: a one-channel generator (False: RGB, averaged when stored)
    normaliser: str = "own"  # own | provider: statistics that normalise A's synthetic images

    def epochs_for(self, *, own_task: bool, epochs: int) -> int:
        """Epochs of a run of ``epochs`` in which a task (A's own or not) synthesizes."""
        limit = (own_task and self.epochs_of_a) or self.epochs or epochs
        return min(limit, epochs)

    def steps_of(self, turn: int, call: int) -> int:
        """Steps of a task's call, both counted from 0."""
        later = self.start == "meta" and turn + call > 0
        return min(self.meta_steps, self.steps) if later and self.meta_steps else self.steps

    def __post_init__(self) -> None:
        for name in ("batch", "calls", "steps", "latent", "width", "head_dim", "negatives",
                     "bank_rows"):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 1, f"synthesis.{name} is too small", value, "at least 1")
        for name in ("pad", "head_width", "epochs", "epochs_of_a", "meta_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"synthesis.{name} is negative", value, "0 or more")
        _choice("synthesis.start", self.start, ("fresh", "meta"))
        _require(0 < self.meta_rate <= 1, "synthesis.meta_rate", self.meta_rate, "0 < rate <= 1")
        _require(self.lr > 0, "synthesis.lr", self.lr, "a positive rate")
        _require(self.cr_temperature > 0, "synthesis.cr_temperature", self.cr_temperature, "> 0")
        low, high = self.scale
        _require(0 < low <= high <= 1, "synthesis.scale", self.scale, "0 < low <= high <= 1")
        low, high = self.ratio
        _require(0 < low <= high, "synthesis.ratio", self.ratio, "0 < low <= high")
        _require(0 <= self.flip <= 1, "synthesis.flip", self.flip, "a probability")
        _choice("synthesis.normaliser", self.normaliser, ("own", "provider"))


@dataclass(frozen=True)
class StoringConfig:
    """One knowledge storing period (SPEC 5; paper eqs. 5-8)."""

    steps: int = 400  # prompt steps an epoch (upstream --kd_steps)
    batch: int = 64  # images a bank and step
    batch_real: int = 128  # images a step where real data of A is used (mode b)
    lr: float = 0.8  # SGD, cosine over the epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 20.0
    alpha: float = 1.0  # weight of A's term
    beta: float = 1.0  # weight of each provider's term
    target_of_a: str = "prompted"  # prompted (upstream) | plain: which side is the KL's target
    target_of_b: str = "provider"  # provider (upstream) | prompted
    pad: int = 0  # random crop from a frame padded by so many pixels
    flip: float = 0.0  # probability of a horizontal flip
    augment_as_dataset: bool = True  # cifar data: pad 4 and flip 0.5 instead of the two above
    shuffle_colours: bool = False  # permute the channels of every colour image at random
    replay: str = "kernel"  # kernel | dali: who makes the batches of synthetic images

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "batch_real"):
            value = getattr(self, name)
            _require(value >= 1, f"storing.{name} is too small", value, "at least 1")
        _require(self.lr > 0, "storing.lr", self.lr, "a positive rate")
        _require(self.temperature > 0, "storing.temperature", self.temperature, "> 0")
        _require(self.pad >= 0, "storing.pad is negative", self.pad, "0 or more")
        _require(0 <= self.flip <= 1, "storing.flip", self.flip, "a probability")
        _choice("storing.target_of_a", self.target_of_a, ("prompted", "plain"))
        _choice("storing.target_of_b", self.target_of_b, ("provider", "prompted"))
        _choice("storing.replay", self.replay, ("kernel", "dali"))


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on test data while training; it never reaches training (SPEC 7)."""

    every: int = 1  # epochs between evaluations; the last epoch always; 0: never
    batch: int = 256  # images a forward pass; under policy batch the result depends on it

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluation.every is negative", self.every, "0 or more")
        _require(self.batch >= 1, "evaluation.batch is too small", self.batch, "at least 1")


@dataclass(frozen=True)
class LoadingConfig:
    """How real images become batches: mode b, pretraining, evaluation (SPEC 10)."""

    loader: str = "auto"  # dali | torch | auto: DALI where it is installed
    undecodable: str = "error"  # error | skip: image files that do not decode
    memory_gb: float = 4.0  # files are decoded once and kept up to so many 10⁹ bytes a split
    threads: int = 0  # that decode; 0: one a core, at most 8
    prefetch: int = 2  # batches DALI prepares ahead

    def __post_init__(self) -> None:
        _choice("loading.loader", self.loader, LOADERS)
        _choice("loading.undecodable", self.undecodable, ("error", "skip"))
        _require(self.memory_gb >= 0, "loading.memory_gb is negative", self.memory_gb, "0 or more")
        _require(self.threads >= 0, "loading.threads is negative", self.threads, "0 or more")
        _require(self.prefetch >= 1, "loading.prefetch is too small", self.prefetch, "at least 1")


@dataclass(frozen=True)
class PretrainConfig:
    """Training of a small source model on data its owner still has."""

    arch: str = "resnet8"
    data: str = "letters"
    side: int = 16  # image side, pixels
    seed: int = 0
    epochs: int = 10
    batch: int = 128
    lr: float = 0.1  # SGD, one-cycle
    momentum: float = 0.9
    weight_decay: float = 5e-4
    noise: float = 0.0  # std of Gaussian noise added to images in [0, 1]
    adversarial: float = 0.0  # largest L2 length of a one-step attack on images in [0, 1]
    device: str = "auto"
    threads: int = 0
    loading: LoadingConfig = field(default_factory=LoadingConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "side"):
            value = getattr(self, name)
            _require(value >= 1, f"pretrain {name} is too small", value, "at least 1")
        _require(self.lr > 0, "pretrain lr", self.lr, "a positive rate")
        for name in ("noise", "adversarial"):
            value = getattr(self, name)
            _require(value >= 0, f"pretrain {name} is negative", value, "0 or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: which models, which mode, and one part for each stage."""

    preset: str = "paper-bf"
    mode: str = "bf"  # bf | b | t | vanilla (SPEC 6)
    target: str = ""  # model A: [SCHEME:]NAME[@DATA][=PATH]
    providers: tuple[str, ...] = ()  # model B, B2, …
    side: int = 32  # image side of the run, pixels
    epochs: int = 100
    rounds: int = 1  # synthesize-and-store rounds an epoch (upstream ep_steps // kd_steps)
    seed: int = 0
    engine: str = "fast"  # fast | reference
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int = 0  # CPU threads; 0: torch's choice
    precision: str = "fp32"  # fp32 | bf16x3 | tf32 | bf16: how the fast engine multiplies
    graphs: bool = True  # on CUDA, capture each step as a graph (engine fast)
    compile: bool = False  # torch.compile for generator and projection head (engine fast)
    offload: bool = False  # on CUDA, tasks at rest lie in host memory (engine fast)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    storing: StoringConfig = field(default_factory=StoringConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("engine", self.engine, ENGINES)
        _choice("precision", self.precision, PRECISIONS)
        if self.engine == "reference":
            _require(self.storing.replay == "kernel", "the reference engine reads PNGs back",
                     "storing.replay=dali", "storing.replay=kernel")  # fmt: skip
            _require(self.precision == "fp32", "the reference engine computes in fp32",
                     self.precision, "precision fp32")  # fmt: skip
        _require(self.side >= 8 and self.side % 4 == 0, "side", self.side,
                 "a multiple of 4, at least 8 (the generator doubles twice)")  # fmt: skip
        for name, least in (("epochs", 1), ("rounds", 1), ("threads", 0), ("seed", 0)):
            value = getattr(self, name)
            _require(value >= least, f"{name} is too small", value, f"at least {least}")
        if self.mode == "vanilla":
            _require(len(self.providers) <= 1, "mode vanilla imitates one provider",
                     len(self.providers), "one provider")  # fmt: skip
        elif not self.prompt.extend:
            self._check_rings()

    def _check_rings(self) -> None:
        first, count = self.prompt.rings[0], len(self.prompt.rings)
        if first <= self.side:
            raise ConfigError(
                "the first ring is not larger than the image",
                got=f"ring {first}, image side {self.side}",
                expected=f"rings larger than {self.side}, growing outwards",
                fix=f"set prompt.rings=[{self.side + 4}, …] or a smaller side",
            )
        providers = len(self.providers)
        wanted = {providers} if self.mode == "t" else {1, providers + 1}
        if providers and count not in wanted:
            raise ConfigError(
                f"mode {self.mode} with {providers} provider(s) needs another number of rings",
                got=f"{count} rings {list(self.prompt.rings)}",
                expected=" or ".join(f"{n} ring(s)" for n in sorted(wanted)),
                fix="one core ring for A and one more ring a provider (mode t: no core)",
            )

    def digest(self) -> str:
        """sha256 over everything that decides the numbers of the run, hex."""
        kept = {name: value for name, value in to_dict(self).items() if name != "offload"}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values; tuples become lists."""
    plain = dataclasses.asdict(config)
    listed: dict[str, Any] = json.loads(json.dumps(plain))
    return listed
