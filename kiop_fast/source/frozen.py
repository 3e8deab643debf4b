"""A source model: a trained classifier whose parameters and buffers never change again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import SourceError
from kiop_fast.source.batchnorm import with_statistics
from kiop_fast.source.casts import FrozenCasts


@dataclass(frozen=True)
class Source:
    """A frozen classifier and the facts about the data it was trained on.

    Attributes:
        name: e.g. ``resnet8@letters``.
        arch: name of the architecture, e.g. ``resnet8``.
        model: in eval mode, no parameter requires a gradient; takes (N, 3, s, s) normalised.
        info: classes, channels and normaliser of its data.
        sha256: fingerprint over all parameters and buffers when it was frozen.
        accuracy: on its own test data, as recorded with the checkpoint; None if unknown.
        rowwise: it takes no channels-last images (it calls ``view`` on a map); such are copied.
    """

    name: str
    arch: str
    model: nn.Module
    info: DatasetInfo
    sha256: str
    accuracy: float | None = None
    rowwise: bool = False

    @property
    def classes(self) -> int:
        return len(self.info.classes)

    @cached_property
    def _casts(self) -> FrozenCasts:
        return FrozenCasts(self.model)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles make casts of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_casts"}

    def with_statistics(self, statistics: Mapping[str, Tensor] | None) -> Source:
        """The same classifier on other BatchNorm statistics (:func:`with_statistics`)."""
        model = with_statistics(self.model, statistics)
        beside = replace(self, model=model)
        beside.__dict__["_casts"] = FrozenCasts(model, self._casts)
        return beside

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) normalised → (N, classes); under autocast without casting weights anew."""
        if self.rowwise:
            images = images.contiguous()
        if torch.compiler.is_compiling():  # compiled code casts as it sees fit
            compiled: Tensor = self.model(images)
            return compiled
        with self._casts.active(images.device):
            found: Tensor = self.model(images)
        return found

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, s, s) in [0, 1] → (N, 3, s, s) normalised; grey is repeated."""
        mean = images.new_tensor(self.info.mean).view(3, 1, 1)
        std = images.new_tensor(self.info.std).view(3, 1, 1)
        return (images - mean) / std

    def check_unchanged(self) -> None:
        """Raise SourceError if any parameter or buffer differs from when it was frozen."""
        now = fingerprint(self.model)
        if now != self.sha256:
            raise SourceError(
                f"source {self.name!r} was changed during the run; sources are frozen for good",
                got=f"sha256 {now[:16]}…",
                expected=f"sha256 {self.sha256[:16]}…",
                fix="do not train, load into or re-register the model that was given",
            )


def freeze(
    model: nn.Module, info: DatasetInfo, *, name: str, arch: str, accuracy: float | None = None
) -> Source:
    """Put ``model`` in eval mode, switch its gradients off and take its fingerprint."""
    model.eval().requires_grad_(False)
    rowwise = is_rowwise(model, info.side)
    return Source(name, arch, model, info, fingerprint(model), accuracy, rowwise)


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and (Distributed)DataParallel.

    Raises:
        SourceError: a scripted or traced model, whose layers are out of reach.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        inside = model.module if isinstance(model, parallel) else model._orig_mod
        assert isinstance(inside, nn.Module)
        model = inside
    if isinstance(model, torch.jit.ScriptModule):
        raise SourceError(
            "a scripted or traced model cannot be used: its BatchNorm layers are out of reach",
            got=type(model).__name__, expected="an ordinary nn.Module",
            fix="give the model that it was made of",
        )  # fmt: skip
    return model


@torch.no_grad()
def is_rowwise(model: nn.Module, side: int) -> bool:
    """Whether channels-last images, and nothing else about them, stop a forward pass."""
    weight = next(model.parameters(), None)
    images = torch.zeros(2, 3, side, side) if weight is None else weight.new_zeros(2, 3, side, side)
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        return "view size is not compatible" in str(error)
    except Exception:  # it is another's to say that the model does not take such images
        return False
    return False


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer, hex."""
    digest = hashlib.sha256()
    entries = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
