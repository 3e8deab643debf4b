"""``kiop-fast import-upstream`` and ``export-upstream``, apart from parsing and printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kiop_fast.dropin import checkpoint as pth
from kiop_fast.dropin import convert
from kiop_fast.dropin.flags import script_name
from kiop_fast.errors import SourceError
from kiop_fast.prompt.artefact import load_prompt, prompt_file
from kiop_fast.source import Source, load_source, parse_source


def import_upstream(
    checkpoint: Path, out: Path, target: str, providers: Sequence[str],
    mappings: Sequence[str] | None, script: str | None, seed: int, backbones: str, *,
    verify: bool, batch: int,
) -> None:  # fmt: skip
    """A ``.pth`` of the authors' scripts as a prompt file (see ``dropin/convert.py``)."""
    rings = pth.read_checkpoint(checkpoint)
    model = _target(target, (rings.side, *rings.rings))
    names = [name.partition("=")[0].rpartition("@")[2] for name in providers]
    given = [convert.parse_mapping(text) for text in mappings] if mappings else None
    b, s, *others = [*backbones.split(","), *[backbones.split(",")[-1]] * 2]
    replay = convert.Replay(script_name(script), seed, b, s, others[0]) if script else None
    convert.import_upstream(checkpoint, out, model, names, mappings=given, replay=replay,
                            verify=verify, batch=batch)  # fmt: skip


def export_upstream(prompt: Path, out: Path, target: str | None) -> None:
    """A prompt file as a ``.pth`` of the authors' scripts."""
    path = prompt_file(prompt)
    artefact = load_prompt(path)
    text = target or artefact.config.get("target")
    if not text:
        raise SourceError("the prompt file does not say where its target lies",
                          got=artefact.target.name, fix="give --target NAME@DATA=PATH")  # fmt: skip
    convert.export_upstream(path, out, _target(text, (artefact.side, *artefact.rings)))


def _target(text: str, sides: Sequence[int]) -> Source:
    """Model A on the CPU."""
    return load_source(parse_source(text), sides=sides, device=torch.device("cpu"))
