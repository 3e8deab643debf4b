"""The house rules that a machine can check: imports point down, rooms keep to themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kiop_fast"

# A room and the rooms it may import (besides itself and the leaves).
LEAVES = {"config", "config_io", "errors", "runtime", "data"}
ALLOWED: dict[str, set[str]] = {
    "config": {"errors"},
    "config_io": {"config", "errors"},
    "errors": set(),
    "runtime": {"errors", "__init__"},
    "data": {"config", "errors", "runtime"},
    "kernels": {"errors"},
    "source": LEAVES | {"kernels", "pretrain"},
    "prompt": LEAVES | {"source", "kernels"},
    "synthesize": LEAVES | {"prompt", "source", "kernels"},
    "store": LEAVES | {"prompt", "source", "kernels"},
    "reference": LEAVES | {"prompt", "source", "synthesize", "store"},
    "deliver": LEAVES | {"prompt", "source"},
    "upstream": {"dropin", "errors", "runtime"},
    "patch": {"dropin", "errors"},
}


def imports(file: Path) -> set[str]:
    """Full names of every kiop_fast module that ``file`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "kiop_fast"}


def rooms(file: Path) -> set[str]:
    """The rooms that ``file`` imports."""
    return {name.split(".")[1] for name in imports(file) if "." in name} - {"__version__"}


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).glob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_down(room: str) -> None:
    for file in files_of(room):
        strange = rooms(file) - ALLOWED[room] - {room}
        assert not strange, f"{file.relative_to(PACKAGE)} imports {sorted(strange)}"


def test_the_two_periods_never_meet() -> None:
    for room, other in (("synthesize", "store"), ("store", "synthesize")):
        for file in files_of(room):
            assert other not in rooms(file)


def test_only_front_doors_know_the_dropin_room() -> None:
    """Nothing that computes depends on the authors' formats; command lines and doors may."""
    doors = {"__init__.py", "cli.py", "commands.py", "upstream.py", "patch.py"}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "dropin" and file.relative_to(PACKAGE).as_posix() not in doors:
            assert "dropin" not in rooms(file), file


def test_reference_uses_no_kernel() -> None:
    for file in files_of("reference"):
        assert "kernels" not in rooms(file)


def test_only_the_evaluation_room_reads_test_splits() -> None:
    readers = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and call.attr == "test":
                readers.append(file.relative_to(PACKAGE).parts[0])
    assert set(readers) == {"deliver"}


def test_importing_has_no_side_effects() -> None:
    """No compiler flag, thread count, default dtype or RNG state changes on import."""
    program = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(),"
        " torch.random.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled());"
        "import kiop_fast.pipeline;"
        "after = (torch.get_num_threads(), torch.get_default_dtype(),"
        " torch.random.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled());"
        "assert before == after, (before, after)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_repository_names_no_package_index() -> None:
    hosts = ["pypi." + "org", "pythonhosted." + "org", "/opt/" + "pypi"]
    root = PACKAGE.parent
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.split()
    for name in listed:
        path = root / name
        if path.is_file() and path.suffix not in {".png", ".safetensors"}:
            text = path.read_text(errors="ignore")
            assert not any(host in text for host in hosts), name
