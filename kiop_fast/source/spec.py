"""How a source is written: ``[SCHEME:]NAME[@DATA][=PATH]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kiop_fast.data.names import DOWNLOADED
from kiop_fast.errors import SourceError, unknown_name
from kiop_fast.source.schemes import SCHEMES


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user names it.

    Attributes:
        scheme: who builds the model: ``zoo`` (an architecture), ``python`` (your function),
            ``timm``, ``torchvision``, ``hf-hub``.
        name: what that scheme is asked for, e.g. ``resnet18`` or ``mymodule:build``.
        data: dataset it was trained on; empty: as recorded in the file.
        path: its weights; None: the cache, or what a python function or a hub returns.
    """

    scheme: str
    name: str
    data: str = ""
    path: Path | None = None

    @property
    def label(self) -> str:
        """Short name for tables, e.g. ``resnet8@letters``."""
        return f"{self.name}@{self.data}" if self.data else self.name

    @property
    def arch(self) -> str:
        """The architecture as results name it, e.g. ``resnet18``, ``timm:resnet10t``."""
        return self.name if self.scheme in ("zoo", "torchvision") else f"{self.scheme}:{self.name}"

    def __str__(self) -> str:
        scheme = "" if self.scheme == "zoo" else f"{self.scheme}:"
        return f"{scheme}{self.label}" + (f"={self.path}" if self.path else "")


# How the authors' scripts name their checkpoints in the working folder (SPEC section 10).
_AUTHORS = re.compile(
    r"(?P<folder>.*/)?(?:(?P<resnet>ResNet(?:18|50|101))(?:_32)?|(?P<vgg>vgg13_bn))"
    rf"_(?P<data>{'|'.join(DOWNLOADED)})"
)


def parse_source(text: str) -> SourceSpec:
    """Read ``resnet18@cifar100=model.pth``, ``python:mymodule:build@digits`` and the like.

    ``ResNet18_cifar10``, ``ResNet18_32_mnist`` and ``vgg13_bn_cifar10`` (in any folder, or
    ``=PATH``) are files of the authors' scripts.

    Raises:
        SourceError: a part is empty, or the scheme or architecture is unknown (close matches
            are given).
    """
    model, equals, path = text.strip().partition("=")
    authors = None if "@" in model else _AUTHORS.fullmatch(model)
    if authors is not None:
        arch = authors["resnet"] or authors["vgg"]
        return SourceSpec(
            "zoo", arch.lower(), authors["data"], Path(path if equals and path else model)
        )
    model, at, data = model.partition("@")
    scheme, colon, name = model.partition(":")
    if not colon:
        scheme, name = "zoo", model
    if not name or (at and not data) or (equals and not path):
        raise SourceError(
            "a source is not written rightly",
            got=repr(text),
            expected="[SCHEME:]NAME[@DATA][=PATH], e.g. resnet18@cifar100=model.pth",
            fix="fill in the empty part",
        )
    if scheme not in SCHEMES:
        raise unknown_name("source scheme", scheme, SCHEMES, SourceError)
    SCHEMES[scheme].check(name)
    return SourceSpec(scheme, name, data, Path(path).expanduser() if path else None)
