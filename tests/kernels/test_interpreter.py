"""Every ``test_kernel_…`` of this folder, run under Triton's CPU interpreter in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ON_GPU

from kiop_fast.kernels.dispatch import INTERPRETED, triton

HERE = Path(__file__).parent
FILES = sorted(p.name for p in HERE.glob("test_*.py") if "def test_kernel_" in p.read_text())


def unfit() -> str:
    """Why the interpreter cannot run here; empty when it can."""
    if triton is None:
        return "Triton is not installed"
    import numpy

    numpy_version = tuple(map(int, numpy.__version__.split(".")[:2]))
    if triton.__version__.startswith("3.6.") and numpy_version >= (2, 4):
        return "the interpreter of Triton 3.6 cannot loop with NumPy 2.4 or newer"
    return ""


@pytest.mark.skipif(ON_GPU, reason="the kernels themselves run here")
@pytest.mark.skipif(INTERPRETED, reason="already inside")
@pytest.mark.skipif(bool(unfit()), reason=unfit())
def test_kernels_in_the_interpreter() -> None:
    files = [str(HERE / name) for name in FILES if name != Path(__file__).name]
    run = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-k", "test_kernel_", "-p", "no:cacheprovider", "-rs"),
            *("--durations=5", "-W", "ignore:.*encountered in:RuntimeWarning"),
            *files,
        ],
        cwd=HERE.parents[1],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "KIOP_FAST_KERNELS": "triton", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed.group(1)) >= len(files)
