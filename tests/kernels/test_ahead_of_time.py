"""Every kernel compiles for Ampere, Hopper and Blackwell, and none spills registers.

Hopper gets every default configuration; the others the first of each kernel, dtype and precision,
or all of them with ``KERNELS_AHEAD_OF_TIME=all``.  Results are kept in pytest's cache until a
kernel or Triton changes.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kiop_fast.kernels
from kiop_fast.kernels.dispatch import INTERPRETED, triton

HERE = Path(__file__).parent
DTYPES = {"fp32", "bf16", "fp16"}
# Bytes of shared memory one block may have, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Kernels whose pointers are fp32 and int64 whatever the operation's dtype is.
ONE_DTYPE = {"_mapped_kl_sum_kernel", "_bn_match_loss_kernel"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile"),
]


def all_kernels() -> set[str]:
    """Names of the Triton kernels that exist in the package."""
    package = kiop_fast.kernels
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.fixture(scope="module")
def compilers(pytestconfig: pytest.Config) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A process a capability, all at once: compiling keeps one core busy."""
    cache = getattr(pytestconfig, "cache", None)  # absent under -p no:cacheprovider
    running = {}
    for capability in SHARED_MEMORY:
        kept = cache and ["--kept", str(cache.mkdir("ahead_of_time") / f"sm_{capability}.json")]
        reduced = capability != 90 and os.environ.get("KERNELS_AHEAD_OF_TIME") != "all"
        running[capability] = subprocess.Popen(
            [
                *(sys.executable, str(HERE / "ahead_of_time.py"), str(capability)),
                *(kept or []),
                *(["--first"] if reduced else []),
            ],
            cwd=HERE.parents[1],
            env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_without_spills(
    capability: int, compilers: dict[int, subprocess.Popen[str]], record_property: Any
) -> None:
    run = compilers[capability]
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr[-4000:]
    rows = [json.loads(line) for line in stdout.splitlines()]
    if "missing" in rows[0]:
        pytest.skip(rows[0]["missing"])
    for row in rows:
        line = "{kernel:28} {dtype}: {registers:3} registers, {spills} spilled, {shared:6} shared"
        print(f"sm_{capability}", line.format(**row))
    record_property(f"sm_{capability}", json.dumps(rows))

    compiled = {(row["kernel"], row["dtype"]) for row in rows}
    wanted = {
        (kernel, dtype) for kernel in all_kernels() - ONE_DTYPE for dtype in DTYPES
    } | {(kernel, "fp32") for kernel in ONE_DTYPE}  # fmt: skip
    assert wanted <= compiled, f"not compiled: {sorted(wanted - compiled)}"
    assert not [row for row in rows if row["spills"]]
    assert not [row for row in rows if row["shared"] > SHARED_MEMORY[capability]]
