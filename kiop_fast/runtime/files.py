"""Files that survive a kill: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiop_fast.errors import RunError


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that ``path`` holds either its old bytes or all of the new ones."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_writable(path: Path) -> None:
    """Before long work: a file can be written there; its folder is made.

    Raises:
        RunError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RunError(
            f"{path} cannot be written", got=error.strerror or str(error),
            expected="the name of a file, in a folder where files may be made",
            fix="choose another --out",
        ) from None  # fmt: skip


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors and JSON-able ``facts`` into one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kiop_fast": json.dumps(dict(facts), sort_keys=True)}
    atomic_write(path, safetensors.torch.save(plain, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("kiop_fast", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path.name} cannot be read", got=f"{path}: {error}",
            expected="a safetensors file written by kiop_fast",
            fix="if it belongs to a run, start that run again in a new folder",
        ) from None  # fmt: skip


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """All ``records`` as JSON lines, atomically."""
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none if it is absent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a kill during a write left in ``folder`` or below."""
    for leftover in folder.rglob(".*.*"):
        if leftover.is_file():
            leftover.unlink()
