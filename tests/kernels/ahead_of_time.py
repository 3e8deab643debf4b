"""Compiles what the launchers would launch, without a GPU.

``python ahead_of_time.py CAPABILITY [--first] [--kept FILE] [OPERATION ...]`` prints one JSON line
a kernel: ``{"operation", "dtype", "capability", "kernel", "registers", "spills", "shared"}``,
registers and spilled bytes from ``ptxas -v``.  It runs in a process of its own, for it replaces
``dispatch.launch`` and calls the launchers with meta tensors in the sizes of the paper's setting:
exactly the default configurations are compiled.  ``--first`` compiles only the first launch of each
kernel, dtype and precision.  ``--kept`` names a file of results: what neither a kernel's source nor
Triton has changed since is read from it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kiop_fast.kernels import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def prompt_pad(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.prompt_pad_triton import launch_bwd, launch_fwd

    image, cells = meta(64, 3, 32, 32, dtype=dtype), meta(3, 15360)
    for channels_last in (False, True):
        launch_fwd(image, cells, [36, 128], dtype, channels_last)
    launch_bwd(meta(64, 3, 128, 128, dtype=dtype), cells, [32, 36, 128])
    launch_bwd(meta(64, 3, 224, 224, dtype=dtype), meta(3, 49152), [32, 36, 128, 224])


def mapped_kl(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.mapped_kl_triton import launch_bwd, launch_fwd

    def both_ways(n: int, ka: int, kb: int, only_agreeing: bool, mapped: bool) -> None:
        logits, target = meta(n, ka, dtype=dtype), meta(n, kb, dtype=dtype)
        mapping = meta(kb, dtype=torch.int64) if mapped else None
        launch_fwd(logits, target, mapping, 20.0, only_agreeing, mapped)
        tables = meta(6, n), meta(ka, dtype=torch.int64)
        launch_bwd(meta(), logits, target, mapping, *tables, 20.0, True, True)

    both_ways(64, 100, 10, False, True)
    both_ways(64, 100, 100, True, False)
    both_ways(16384, 1000, 1000, False, False)
    both_ways(256, 16384, 16384, False, True)


def bn_match(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.bn_match_triton import launch_bwd, launch_fwd

    for c, side, relu in ((64, 16, False), (64, 8, True), (512, 1, False)):
        x, c_vector, total = meta(128, c, side, side, dtype=dtype), meta(c), meta()
        if relu:
            x = x.to(memory_format=torch.channels_last)
        layer = (c_vector,) * 4
        launch_fwd(x, *layer, 1e-5, 64, relu)
        launch_bwd(x, total, meta(128, c), x, *layer, meta(3, c), 1e-5, 64, relu)


def views(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.views_triton import launch_bwd, launch_fwd

    crop, box = meta(64, 2, dtype=torch.int64), meta(64, 4, dtype=torch.int64)
    flip = meta(64, dtype=torch.bool)
    tables = (crop, flip, box, flip)
    for channels, side, channels_last in ((3, 32, False), (1, 16, True), (3, 33, False)):
        images = meta(64, channels, side, side, dtype=dtype)
        grad = meta(128, 3, side, side, dtype=dtype)
        launch_fwd(images, *tables, 4, meta(3), meta(3), dtype, channels_last)
        launch_bwd(grad, *tables, meta(3), 4, channels, dtype)


def bank_replay(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.bank_replay_triton import launch

    index, crop = meta(64, dtype=torch.int64), meta(64, 2, dtype=torch.int64)
    flip, normaliser = meta(64, dtype=torch.bool), (meta(3), meta(3))
    colour, grey = (meta(4096, c, 32, 32, dtype=torch.uint8) for c in (3, 1))
    launch(colour, index, crop, flip, 4, *normaliser, dtype, False)
    launch(grey, index, None, None, 0, *normaliser, dtype, True)


def info_nce(dtype: torch.dtype) -> None:
    from kiop_fast.kernels.info_nce_triton import launch_bwd, launch_fwd

    num_keys = meta(dtype=torch.int64)
    for m, k, width in ((4160, 4160, 256), (64, 64, 256), (64, 4160, 512)):
        queries, keys, weights = meta(m, width, dtype=dtype), meta(k, width, dtype=dtype), meta(m)
        launch_fwd(queries, keys, weights, num_keys, 0.6, True)
        launch_bwd(meta(), queries, weights, num_keys, k, 0.6)
    if dtype == torch.float32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for width in (256, 512):
            launch_fwd(meta(64, width), meta(4160, width), meta(64), None, 0.6, True)
        torch.backends.cuda.matmul.fp32_precision = "ieee"


# An operation's launches at one dtype; add yours here.
OPERATIONS: dict[str, Callable[[torch.dtype], None]] = {
    "prompt_pad": prompt_pad,
    "mapped_kl": mapped_kl,
    "info_nce": info_nce,
    "bn_match": bn_match,
    "views": views,
    "bank_replay": bank_replay,
}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def record(operation: str, dtype: torch.dtype) -> list[Launch]:
    """The (kernel, arguments, keywords) an operation would launch."""
    recorded: list[Launch] = []
    dispatch.launch = lambda kernel, grid, *args, **kw: recorded.append((kernel, args, kw))
    OPERATIONS[operation](dtype)
    return recorded


def specialise(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Source and options as Triton's own launch would choose them from the arguments."""
    kernel, args, keywords = launch
    options = dispatch.COMPILE_OPTIONS | {
        k: v for k, v in keywords.items() if k not in kernel.arg_names
    }
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in keywords.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes), options


def compile_one(source: ASTSource, options: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel on one architecture."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not registers or not spills:
        raise RuntimeError(f"no ptxas -v report for {source.name}:\n{log.getvalue()}")
    return {
        "kernel": source.name,
        "registers": max(map(int, registers)),
        "spills": sum(map(int, spills)),
        "shared": compiled.metadata.shared,
    }


def rows(
    capability: int, operations: list[str], first: bool, kept: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, result), each specialisation once; ``kept`` is read and grows."""
    done = set()
    for operation in operations or list(OPERATIONS):
        for dtype_name, dtype in DTYPES.items():
            for launch in record(operation, dtype):
                source, options = specialise(launch)
                key = f"{triton.__version__} {capability} {source.hash()} {sorted(options.items())}"
                key = hashlib.sha256(key.encode()).hexdigest()
                group = (source.name, dtype_name, launch[2].get("PRECISION"))
                if key in done or (first and group in done):
                    continue
                done |= {key, group}
                if key not in kept:
                    kept[key] = compile_one(source, options, capability)
                where = {"operation": operation, "dtype": dtype_name, "capability": capability}
                yield key, where | kept[key]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("operations", nargs="*")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--kept", type=Path)
    asked = parser.parse_args()
    try:
        get_ptxas(asked.capability)
    except RuntimeError as error:
        print(json.dumps({"missing": str(error)}))
        return
    kept = json.loads(asked.kept.read_text()) if asked.kept and asked.kept.exists() else {}
    used = {}
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        for key, row in rows(asked.capability, asked.operations, asked.first, kept):
            used[key] = kept[key]
            print(json.dumps(row), flush=True)
    if asked.kept:
        asked.kept.write_text(json.dumps(used))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
