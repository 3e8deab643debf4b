"""Recorded results: everything a machine measured at one scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kiop_fast.bench import Compared, Record, compared, read_records


@dataclass
class Machine:
    """Everything recorded at one scale on one machine.

    Attributes:
        run: facts of the latest run: device, versions, ceilings.
    """

    name: str
    scale: str
    run: Record
    records: list[Record] = field(default_factory=list)

    def rows(self) -> list[Compared]:
        """Compared rows, stages in the order they were measured."""
        return compared(self.records)

    def latest(self) -> list[Record]:
        """The raw latest row of each stage, engine and precision."""
        found = {
            (r["stage"], r["engine"], r["precision"]): r for r in self.records if r["kind"] == "row"
        }
        return list(found.values())


def machines(files: Iterable[Path]) -> list[Machine]:
    """Records by machine and scale, oldest first."""
    found: dict[tuple[str, str], Machine] = {}
    for file in sorted(files, key=lambda path: path.stem[-10:]):
        here: Machine | None = None
        for record in read_records(file):
            if record["kind"] == "run":
                key = record["device"], record["scale"]
                here = found.setdefault(key, Machine(*key, record))
                here.run = record
            elif here is not None:
                here.records.append(record)
    return list(found.values())
