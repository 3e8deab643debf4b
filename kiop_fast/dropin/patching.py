"""``accelerate_upstream()``: put our methods into the authors' classes, and take them out again.

Their classes stay the same objects, whoever has imported them already: only methods are
exchanged.  The function ``kldiv`` is exchanged in every module of the checkout that names it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kiop_fast.dropin.fast_parts import fast_kldiv, fast_prompt
from kiop_fast.dropin.fast_pool import fast_pool
from kiop_fast.dropin.fast_synthesizer import Draw, Order, Parts, fast_synthesizer
from kiop_fast.dropin.signatures import version_of
from kiop_fast.errors import UpstreamError


@dataclass
class _State:
    """What is swapped now: (module or class, attribute, original), and calls of ours by name."""

    swapped: list[tuple[Any, str, Any]] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)


_state = _State()


def accelerate_upstream(
    on: bool = True, *, draw: Draw | None = None, order: Order | None = None
) -> Counter[str]:
    """Accelerate the authors' CMISynthesizer, kldiv, KLDiv, ExpansiveVisualPrompt and ImagePool.

    Call it before the script, where ``import datafree`` finds the checkout (KiOP's, or CMI's,
    which has no visual prompt).  The script itself stays untouched.  Names that modules of the
    checkout, or the running script, have imported already are swapped too.

    Args:
        on: False puts everything back.
        draw, order: feed random numbers (see ``dropin/fast_synthesizer.py``).

    Returns:
        How often each accelerated part was called, counting on as the script runs.

    Raises:
        UpstreamError: no checkout, or one whose classes have other arguments; all names that
            differ are listed, and nothing is swapped.
    """
    _undo()
    if not on:
        return _state.count
    _state.count = Counter()
    datafree = _import("datafree")
    prompts = _import("visual_prompt", needed=False)
    found: dict[str, Any] = {
        "CMISynthesizer": getattr(_import("datafree.synthesis"), "CMISynthesizer", None),
        "ImagePool": getattr(_import("datafree.utils"), "ImagePool", None),
        "KLDiv": getattr(_import("datafree.criterions"), "KLDiv", None),
        "kldiv": getattr(_import("datafree.criterions"), "kldiv", None),
        "ExpansiveVisualPrompt": getattr(prompts, "ExpansiveVisualPrompt", None),
    }
    if found["CMISynthesizer"] is None:
        raise UpstreamError("datafree.synthesis has no CMISynthesizer", got=datafree.__file__,
                            expected="KiOP or CMI", fix="run in their checkout")  # fmt: skip
    version, count = version_of(found), _state.count
    unlabeled = _import("datafree.utils").UnlabeledImageDataset
    pool, prompt = found["ImagePool"], found["ExpansiveVisualPrompt"]
    parts = Parts(found["CMISynthesizer"], version, pool, unlabeled, count, draw, order)
    _put(pool, fast_pool(pool, count))
    _put(found["CMISynthesizer"], fast_synthesizer(parts))
    if prompt is not None:
        _put(prompt, fast_prompt(prompt, count))
    _swap(found["kldiv"], fast_kldiv(found["kldiv"], count), _root(datafree))
    return count


def accelerated_calls() -> dict[str, int]:
    """How often each accelerated part was called since the swap."""
    return dict(_state.count)


def _import(name: str, *, needed: bool = True) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not needed and error.name == name:
            return None
        raise UpstreamError(
            f"the authors' module {name!r} cannot be imported", got=error,
            expected="a checkout of their code on the path, with what it needs installed",
            fix="run in the folder of KiOP_BF.py, or put that folder first on PYTHONPATH",
        ) from None  # fmt: skip


def _root(datafree: ModuleType) -> Path:
    """The folder of the checkout."""
    assert datafree.__file__ is not None
    return Path(datafree.__file__).resolve().parent.parent


def _put(kind: Any, methods: dict[str, Any]) -> None:
    """Put ``methods`` into a class."""
    for name, method in methods.items():
        _state.swapped.append((kind, name, getattr(kind, name)))
        setattr(kind, name, functools.wraps(getattr(kind, name))(method))


def _swap(original: Any, ours: Any, root: Path) -> None:
    """Put ``ours`` wherever a module of the checkout, or the script at work, names ``original``."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        inside = file and root in Path(file).resolve().parents
        if module is None or not (inside or getattr(module, "__name__", "") == "__main__"):
            continue
        for name, value in list(vars(module).items()):
            if value is original:
                _state.swapped.append((module, name, original))
                setattr(module, name, ours)


def _undo() -> None:
    for owner, name, original in reversed(_state.swapped):
        setattr(owner, name, original)
    _state.swapped.clear()
