"""What works on this machine: libraries, GPU, Triton, DALI, graphs, memory, disk."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from kiop_fast.config import LoadingConfig
from kiop_fast.data import DatasetInfo, Split, dali, open_feed
from kiop_fast.doctor.check import Check, look, size
from kiop_fast.kernels import bank_replay, dispatch

tl = dispatch.tl  # None without Triton

LEAST_DISK = 1e9  # bytes for runs and caches
LEAST_MEMORY = 1e9


@dispatch.jit
def _add_one_kernel(x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def,name-defined]
    o = tl.arange(0, SIZE)
    tl.store(x_ptr + o, tl.load(x_ptr + o) + 1.0)


def machine_checks(device: torch.device, folder: Path) -> list[Check]:
    """Every check that needs no settings.

    Args:
        device: where a run would compute.
        folder: where a run would write.
    """
    checks = {
        "python": _python,
        "torch": lambda: _torch(),
        "GPU": lambda: _gpu(),
        "Triton": lambda: _triton(device),
        "DALI": lambda: _dali(device),
        "graph capture": lambda: _graphs(device),
        "timm": _timm,
        "memory": lambda: _memory(device),
        "disk": lambda: _disk(folder),
    }
    return [look(name, check) for name, check in checks.items()]


def _python() -> Check:
    return Check("python", "pass", f"{platform.python_version()}, {platform.platform()}")


def _torch() -> Check:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
    found = f"{torch.__version__}, {built}, {torch.get_num_threads()} CPU threads"
    parts = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    if parts < (2, 11):
        return Check("torch", "FAIL", found, "pip install 'torch>=2.11'")
    return Check("torch", "pass", found)


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return asked.stdout.split("\n")[0].strip() or None if asked.returncode == 0 else None


def _gpu() -> Check:
    driver = _driver()
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = (
            f"{facts.name}, capability {facts.major}.{facts.minor}, "
            f"{size(facts.total_memory)}, {torch.cuda.device_count()} visible, driver {driver}"
        )
        if (facts.major, facts.minor) < (8, 0):
            return Check("GPU", "note", found, "kernels are tuned for capability 8.0 and later")
        return Check("GPU", "pass", found)
    if driver is None:
        return Check("GPU", "note", "no NVIDIA GPU; everything runs on the CPU")
    if torch.version.cuda is None:
        return Check("GPU", "FAIL", f"driver {driver}, but this torch has no CUDA",
                     "install a CUDA build of torch")  # fmt: skip
    return Check("GPU", "FAIL", f"driver {driver}, but torch (CUDA {torch.version.cuda}) sees no "
                 "GPU", "update the driver, or unset CUDA_VISIBLE_DEVICES")  # fmt: skip


def _triton(device: torch.device) -> Check:
    if dispatch.triton is None:
        linux = platform.system() == "Linux"
        return Check("Triton", "FAIL" if linux and device.type == "cuda" else "note",
                     "not installed; the eager twins run",
                     "pip install 'triton>=3.6'" if linux else "")  # fmt: skip
    number = dispatch.triton.__version__
    if device.type == "cuda":
        bank = torch.arange(2 * 3 * 16, dtype=torch.uint8, device=device).view(2, 3, 4, 4)
        ones = torch.ones(3, device=device)
        made = bank_replay(bank, torch.tensor([1], device=device), mean=0 * ones, std=ones)
        off = (made - bank[1:] / 255).abs().max().item()
        if off > 1e-6:
            return Check("Triton", "FAIL", f"{number}: bank_replay is off by {off:.1e}",
                         "KIOP_FAST_KERNELS=torch runs without kernels; report this")  # fmt: skip
        return Check("Triton", "pass", f"{number}: a kernel was compiled and run")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(_add_one_kernel, {"x_ptr": "*fp32", "SIZE": "constexpr"}, {"SIZE": 64})
    target = GPUTarget("cuda", 90, 32)
    dispatch.triton.compile(source, target=target, options=dict(dispatch.COMPILE_OPTIONS))
    return Check("Triton", "pass", f"{number}: a kernel was compiled for capability 9.0; no GPU "
                 "to run it")  # fmt: skip


def _dali(device: torch.device) -> Check:
    if not dali.available():
        able = platform.system() == "Linux" and platform.machine() == "x86_64"
        return Check("DALI", "note", "not installed; images are read with Pillow and torch",
                     dali.INSTALL if able else "")  # fmt: skip
    images = torch.arange(4 * 3 * 64, dtype=torch.uint8).view(4, 3, 8, 8)
    info = DatasetInfo("doctor", 8, 3, ("a",), (0.5,) * 3, (0.25,) * 3)
    split = Split(images, torch.zeros(4, dtype=torch.int64))
    tables = [torch.arange(4)], [torch.tensor([[0, 2], [1, 1], [2, 0], [2, 2]])]
    made: list[Tensor] = []
    for loader in ("dali", "torch"):
        loading = LoadingConfig(loader=loader, threads=1)
        feed, _ = open_feed(split, info, batch=4, pad=1, device=device, loading=loading)
        made += feed.batches(*tables)
    off = (made[0] - made[1]).abs().max().item()
    found = f"{_version('nvidia-dali-cuda130')}: a pipeline ran on {made[0].device}"
    if off > 1e-5:
        return Check("DALI", "FAIL", f"{found} and is off by {off:.1e}",
                     "--loader torch reads without DALI; report this")  # fmt: skip
    return Check("DALI", "pass", found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def _graphs(device: torch.device) -> Check:
    if device.type != "cuda":
        return Check("graph capture", "note", "CUDA graphs need a GPU; steps are called one by one")
    x = torch.zeros(8, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    for _ in range(3):
        graph.replay()
    if x.tolist() != [4.0] * 8:
        return Check("graph capture", "FAIL", f"three replays made {x[0].item():.0f} of 4",
                     "graphs=false runs without")  # fmt: skip
    return Check("graph capture", "pass", "captured and replayed")


def _timm() -> Check:
    if importlib.util.find_spec("timm") is None:
        return Check("timm", "note", "not installed; needed for timm: and hf-hub: sources",
                     "pip install timm")  # fmt: skip
    return Check("timm", "pass", _version("timm"))


def free_memory(device: torch.device) -> float:
    """Bytes that a run may take on its device (host memory: what the system calls available)."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if facts.exists():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def _memory(device: torch.device) -> Check:
    free = free_memory(device)
    said = f"{size(free)} free on {device}"
    if free < LEAST_MEMORY:
        return Check("memory", "FAIL", said, "close other programs")
    return Check("memory", "pass", said)


def _disk(folder: Path) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    said = f"{size(free)} free at {place}"
    if free < LEAST_DISK:
        return Check("disk", "FAIL", said, "free some, or choose another --out")
    if not os.access(place, os.W_OK):
        return Check("disk", "FAIL", f"{place} cannot be written", "choose another --out")
    return Check("disk", "pass", said)
