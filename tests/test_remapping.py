"""When a run makes its label mappings anew, and from where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import tiny
from torch import Tensor

from kiop_fast import remapping
from kiop_fast.pipeline import train
from kiop_fast.prompt import bank_mapping
from kiop_fast.source import Source
from kiop_fast.sources import Sources

Make = Callable[..., Source]


@pytest.fixture
def sources(make_source: Make) -> Sources:
    return Sources(make_source("resnet8", "letters"), (make_source("resnet8", "digits"),))


def test_frequency_mapping_is_counted_once(sources: Sources, tmp_path: Path) -> None:
    result = train(tiny(prompt={"mapping": "frequency"}), tmp_path / "run", sources=sources)
    assert "digits" in result.metrics[0]["mapping_changed"]
    assert result.metrics[1]["mapping_changed"] == {}


@pytest.mark.parametrize(
    ("rule", "made", "engine"),
    [("iterative", 6, "fast"), ("frequency", 3, "reference"), ("random", 0, "fast")],
)
def test_mappings_are_made_before_and_within_a_storing_period(
    rule: str, made: int, engine: str, sources: Sources, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two epochs of five prompt steps, anew every second step: at 0, 2 and 4 of each."""
    starts = []

    def watched(kind: str, ours: Tensor, theirs: Tensor, before: Tensor | None, t: float) -> Tensor:
        assert (kind, t) == (rule, 4.0)
        assert len(ours) == len(theirs) == 16 * (1 + len(starts) // 3)  # the whole bank
        starts.append(before)
        return bank_mapping(kind, ours, theirs, before, t)

    monkeypatch.setattr(remapping, "bank_mapping", watched)
    config = tiny(engine=engine, prompt={"mapping": rule, "mapping_steps": 2}, storing={"steps": 5})
    result = train(config, tmp_path / "run", sources=sources)
    assert len(starts) == made
    assert [before is None for before in starts] == [True, False, False, False, False, False][:made]
    told = [set(record["mapping_changed"]) for record in result.metrics]
    assert told == [{"digits"} if made else set(), {"digits"} if made == 6 else set()]
