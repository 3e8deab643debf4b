"""SIGKILL at random moments and during a write, then resume: the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal"),
]

PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import random_source
from tiny_runs import tiny
from kiop_fast.pipeline import train
from kiop_fast.sources import Sources

config = tiny(epochs=6, synthesis={{"bank_rows": 40}}, evaluation={{"every": 0}})
provider = random_source("resnet8", "digits", 16)
sources = Sources(random_source("resnet8", "letters", 16), (provider,))
write, countdown = os.fsync, int(os.environ.get("KILL_AT_WRITE", "0"))

def fsync(handle):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.ftruncate(handle, 10)
        os.kill(os.getpid(), signal.SIGKILL)
    write(handle)

os.fsync = fsync
print("ready", flush=True)
train(config, Path(sys.argv[1]), sources=sources, resume=True)
"""


def start(out: Path, **environment: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    began = time.perf_counter()
    assert whole.wait(timeout=120) == 0
    length = time.perf_counter() - began

    out, chance = tmp_path / "killed", random.Random(20241)
    for kill in range(5):
        if kill == 2:
            process = start(out, KILL_AT_WRITE=str(chance.randrange(2, 8)))
        else:
            process = start(out)
            time.sleep(chance.uniform(0.1, 0.5) * length)
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert start(out).wait(timeout=120) == 0
    for name in ("metrics.jsonl", "prompt.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for bank in (tmp_path / "whole" / "banks").rglob("*.safetensors"):
        twin = out / bank.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == bank.read_bytes()
    assert not [p for p in out.rglob(".*") if p.is_file()], "no temporary file is left"
