"""What the steps that a GPU captures are made of, counted on an emulated GPU: no GPU is needed.

    python benchmarks/captured.py [--precision bf16] [--scale paper] [--offload] [--by-operation]

For a synthesis step of either task and a prompt step: operations that write memory (a GPU launches
one kernel or a few for each), and bytes that these read and write, each tensor whole.  Then memory:
what lives outside of graphs, and what their pools need.  Memory that cudnn and cublas take for
themselves, and fragments, come on top.

Nothing here is a time.  Kernels of this project count as one operation; the emulation computes
them by their eager twins, which takes minutes at the paper's sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels are taken, not their twins
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import emulated_cuda
import torch
from emulated_cuda.graphs import Foreign, Graph, written
from sizes import scale
from torch.utils._pytree import tree_leaves, tree_map
from world import World

from kiop_fast.engine import engine

MB = 10**6
OVERWRITE = ("copy_", "fill_", "zero_")  # what they change they do not read


def operations(graph: Graph) -> tuple[Counter[str], Counter[str]]:
    """How often each operation writes memory, and the bytes it reads and writes."""
    count: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for func, args, kwargs, made in graph.calls:
        if not isinstance(func, torch._ops.OpOverload) or "empty" in func.__name__:
            continue
        fresh = [out for out in made if out is not None]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor | Foreign)]
        changed = written(func, *_shown(args, kwargs))
        if fresh or changed:
            count[str(func)] += 1
            written_only = changed if func.__name__.split(".")[0] in OVERWRITE else []
            moved[str(func)] += sum(map(_bytes, [*given, *fresh, *changed]))
            moved[str(func)] -= sum(map(_bytes, written_only))
    return count, moved


def _shown(*values: Any) -> Any:
    return tree_map(lambda value: value.take() if isinstance(value, Foreign) else value, values)


def _bytes(tensor: torch.Tensor | Foreign) -> int:
    if isinstance(tensor, Foreign):
        return tensor.place[1].numel() * tensor.dtype.itemsize
    return tensor.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--scale", default="paper", choices=("paper", "small"))
    parser.add_argument("--offload", action="store_true", help="as the setting of that name")
    parser.add_argument("--by-operation", action="store_true", help="the ten that move most")
    options = parser.parse_args()

    emulated_cuda.install()
    sizes = scale(options.scale, gpu=False)
    problem = sizes.problem.with_(cached=max(sizes.cached), bank=512)
    memory, device = emulated_cuda.CARD.memory, torch.device("cuda", 0)
    print(f"{options.scale}, {options.precision}, {problem.cached} negatives")
    with TemporaryDirectory() as folder:
        world = World(
            problem, engine("fast"), device, Path(folder), precision=options.precision,
            offload=options.offload,
        )  # fmt: skip
        steps = {name: job.system._step for name, job in world.jobs.items()}
        periods: list[tuple[str, Any, Any]] = [
            (f"synthesis step for {name}", world.synthesizing(name), step)
            for name, step in steps.items()
        ]
        for what, period, owner in [*periods, ("prompt step", world.store, world.storing)]:
            period()
            graph = list(owner._runs.values())[-1]._graph
            count, moved = operations(graph)
            print(f"{what}: {count.total()} operations, {moved.total() / MB:.0f} MB", flush=True)
            for name, size in moved.most_common(10 if options.by_operation else 0):
                print(f"    {count[name]:4d} {name:45s} {size / MB:7.0f} MB")
    pools = [size / MB for pool, size in memory.peak.items() if pool is not None]
    print(f"memory outside of graphs: {memory.now[None] / MB:.0f} MB, while the first was captured "
          f"{memory.peak[None] / MB:.0f} MB; {len(pools)} pool(s) of graphs: "
          + " + ".join(f"{size:.0f}" for size in pools) + " MB")  # fmt: skip


if __name__ == "__main__":
    main()
