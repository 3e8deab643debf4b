"""The models of a run: A and those whose knowledge joins it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiop_fast.config import RunConfig
from kiop_fast.data import dataset
from kiop_fast.pretrain import ensure_source
from kiop_fast.prompt import check_class_counts
from kiop_fast.runtime.progress import Progress
from kiop_fast.source import Source, SourceSpec, load_source, parse_source


@dataclass(frozen=True)
class Sources:
    """Model A and the models whose knowledge joins it."""

    target: Source
    providers: tuple[Source, ...]

    def fingerprints(self) -> dict[str, str]:
        """sha256 by role; roles keep two sources of one name apart."""
        roles = {"target": self.target}
        roles.update({f"provider {i + 1}": p for i, p in enumerate(self.providers)})
        return {role: source.sha256 for role, source in roles.items()}

    def check_unchanged(self) -> None:
        """Raise SourceError if training touched a source."""
        for source in (self.target, *self.providers):
            source.check_unchanged()


def load_sources(
    config: RunConfig, rings: tuple[int, ...], device: torch.device, progress: Progress | None
) -> Sources:
    """The models that ``config`` names; small ones for built-in data are trained once and cached.

    Args:
        rings: canvas sides that A will see besides the image side.
    """

    specs = [parse_source(text) for text in (config.target, *config.providers)]
    check_specs(config, specs)

    def load(spec: SourceSpec, sides: tuple[int, ...]) -> Source:
        if spec.path is None:
            ensure_source(spec, config.side, device=config.device, progress=progress)
        return load_source(spec, sides=sides, device=device)

    target = load(specs[0], (config.side, *rings))
    return Sources(target, tuple(load(spec, (config.side,)) for spec in specs[1:]))


def check_specs(config: RunConfig, specs: list[SourceSpec]) -> None:
    """What the names alone tell to be impossible, before anything is trained or loaded.

    Raises:
        DataError: unknown data.
        MappingError: a named dataset has more classes than the target's.
    """
    counts = [len(dataset(spec.data).info.classes) if spec.data else 0 for spec in specs]
    if config.mode == "vanilla" or not counts[0]:
        return
    for spec, count in zip(specs[1:], counts[1:], strict=True):
        check_class_counts(counts[0], count, (str(specs[0]), str(spec)))
