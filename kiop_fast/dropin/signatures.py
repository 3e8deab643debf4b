"""Which version of the authors' code is there?  Told by the names of arguments alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from kiop_fast.errors import UpstreamError

_SYNTHESIZER = """teacher student generator nz num_classes img_size feature_layers cn bank_size
n_neg head_dim init_dataset iterations lr_g progressive_scale synthesis_batch_size
sample_batch_size adv bn oh cr cr_T save_dir transform autocast use_fp16 normalizer device
distributed"""
KIOP = tuple(_SYNTHESIZER.split())
CMI = tuple(name for name in KIOP if name != "cn")

# Arguments of everything that is swapped, by the two versions that are known.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "KiOP": {
        "CMISynthesizer": KIOP, "CMISynthesizer.synthesize": ("targets",),
        "CMISynthesizer.sample": (), "ImagePool": ("root",),
        "ImagePool.add": ("imgs", "cn", "targets"),
        "ImagePool.get_dataset": ("transform", "labeled"),
        "KLDiv": ("T", "reduction"), "KLDiv.forward": ("logits", "targets"),
        "kldiv": ("logits", "targets", "T", "reduction"),
        "ExpansiveVisualPrompt": ("out_size", "mask", "init", "normalize"),
        "ExpansiveVisualPrompt.forward": ("x",),
    },
}  # fmt: skip
EXPECTED["CMI"] = {
    name: names
    for name, names in EXPECTED["KiOP"].items()
    if not name.startswith("ExpansiveVisualPrompt")
} | {"CMISynthesizer": CMI, "ImagePool.add": ("imgs", "targets")}


def arguments(thing: Any) -> tuple[str, ...]:
    """Names of the arguments of a class's constructor or of a function, without ``self``."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def version_of(parts: Mapping[str, Any]) -> str:
    """``KiOP`` or ``CMI``.

    Args:
        parts: the classes and functions that were found, by name.

    Raises:
        UpstreamError: with every name that differs.
    """
    kind = "KiOP" if "cn" in arguments(parts["CMISynthesizer"]) else "CMI"
    wrong = []
    for name, wanted in EXPECTED[kind].items():
        owner, _, method = name.partition(".")
        thing = parts.get(owner)
        thing = getattr(thing, method, None) if method else thing
        if thing is None:
            wrong.append(f"{name} is missing")
            continue
        found = arguments(thing)
        if found != wanted:
            less = [n for n in wanted if n not in found]
            more = [n for n in found if n not in wanted]
            said = [f"lacks {', '.join(less)}"] * bool(less) + [f"adds {', '.join(more)}"] * bool(
                more
            )
            wrong.append(f"{name} {' and '.join(said) or 'has another order of arguments'}")
    if wrong:
        raise UpstreamError(
            f"this version of the authors' code is not the one that can be swapped ({kind})",
            got="; ".join(wrong), expected=f"the names of {kind} as published",
            fix="use that version, or run the script without the patch",
        )  # fmt: skip
    return kind
