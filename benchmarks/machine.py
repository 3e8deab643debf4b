"""The machine of a run: what it is, what it could do at best, what memory a call takes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "torchvision", "numpy", "nvidia-dali-cuda130", "kornia", "kiop-fast")


def facts(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    found: dict[str, Any] = {
        "device": _gpu_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        found["cuda"] = torch.version.cuda
    return found


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes/s of a large copy (read plus written) and FLOP/s of a large product by precision."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 28) if gpu else (1 << 26), device=device)
    target = torch.empty_like(source)
    found = {"bytes_per_s": 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device)}
    side = 8192 if gpu else 1024
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "tf32" and not gpu:
            continue
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        found[f"{name}_flop_per_s"] = 2 * side**3 / _best(lambda a=a, b=b: a @ b, device)
        torch.set_float32_matmul_precision(before)
    return found


def _best(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Seconds of the fastest of some runs, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times[2:])


def wait(device: torch.device) -> None:
    """Until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes reserved by torch (GPU) or resident in this process (CPU) during a call.

    Reserved, not allocated: the memory of captured graphs counts, which replays use.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    except OSError:
        return None
    call()
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith(field)]
    return kilobytes[0] * 1024 if kilobytes else None


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside a checkout."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    changed = commit and _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return commit + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
