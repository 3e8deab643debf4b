"""The authors' script, the script under the patch, and our command: accuracies and wall time.

    KIOP_UPSTREAM=CHECKOUT python benchmarks/dropin.py FOLDER [SEEDS]

Makes stand-in datasets and two ResNet-18 sources in FOLDER (once), then for each seed runs
``KiOP_BF`` three ways in turn, each in a process of its own on one CPU thread, and prints the last
epoch's accuracies and the wall seconds of each.  Adapted from outside only: see
tests/beside_upstream.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from upstream_files import DIGITS, SIGNS, write_gtsrb, write_mnist  # noqa: E402

FLAGS = """--method cmi --cn 3 --dataset mnist --real_dataset gtsrb --backbone_t ResNet18
--backbone_s ResNet18 --teacher mnist --student gtsrb --img_size 32 --vp1_size 36 --vp2_size 48
--batch_size 16 --g_steps 8 --kd_steps 8 --ep_steps 8 --epochs 2 --adv 0.5 --bn 1 --oh 1
--cr 0.8 --cr_T 0.6 --T 20 --lr 0.8 --lr_g 0.01"""


def train(path: Path, images: Tensor, labels: Tensor, classes: int, steps: int) -> float:
    """Train one source on normalised images (M, 3, 32, 32); its last batches' accuracy."""
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=classes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    hits: list[float] = []
    for step in range(steps):
        batch = torch.randint(len(images), (48,), generator=torch.Generator().manual_seed(step))
        logits = model(images[batch])
        loss = nn.functional.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append(float((logits.argmax(1) == labels[batch]).float().mean()))
    torch.save(model.state_dict(), path)
    return statistics.mean(hits[-5:])


def prepare(folder: Path) -> None:
    """Datasets and sources, unless they are there."""
    if (folder / "ResNet18_gtsrb").exists():
        return
    root = folder / "data" / "torchdata"
    if not root.exists():
        write_mnist(root, 600, 300)
        write_gtsrb(root, 860, 301)
    os.environ["KIOP_FAST_DATA"] = str(root)
    from kiop_fast.config import LoadingConfig
    from kiop_fast.data import dataset, open_loader

    for name, file, classes, steps in (("mnist", "ResNet18_32_mnist", DIGITS, 60),
                                       ("gtsrb", "ResNet18_gtsrb", SIGNS, 130)):  # fmt: skip
        known = dataset(name)
        loader = open_loader(known.train(32), known.info, batch=100, training=False,
                             normalise=True, device=torch.device("cpu"),
                             loading=LoadingConfig(loader="torch"))  # fmt: skip
        images, labels = zip(*loader.epoch(), strict=True)
        whole = torch.cat([i.expand(-1, 3, -1, -1) for i in images])
        reached = train(folder / file, whole, torch.cat(labels), classes, steps)
        print(f"{name} source, share of its last training batches: {reached:.3f}", flush=True)


def run(folder: Path, way: str, seed: int, checkout: str) -> dict[str, float]:
    """One run; last accuracies in percent and wall seconds of the whole process."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "pools", ignore_errors=True)
    flags = [
        *FLAGS.split(),
        "--seed",
        str(seed),
        "--save_dir",
        "pools/b",
        "--save_dir_1",
        "pools/a",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}  # fmt: skip
    if way == "command":
        line = [sys.executable, "-m", "kiop_fast.upstream", "KiOP_BF.py", *flags]
    else:
        line = [sys.executable, str(TESTS / "beside_upstream.py"), checkout, "KiOP_BF.py", way, "-",
                "result.json", "--", *flags]  # fmt: skip
    began = time.perf_counter()
    said = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if said.returncode:
        raise SystemExit(said.stderr)
    found = re.findall(r"Epoch=1 Acc@1=([\d.]+).*?Acc@1_tea=([\d.]+)", said.stdout)[-1]
    return {"B": float(found[0]), "A": float(found[1]), "seconds": seconds}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    seeds = [int(s) for s in (sys.argv[2] if len(sys.argv) > 2 else "0,1,2").split(",")]
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    checkout = str(Path(os.environ["KIOP_UPSTREAM"]).resolve())
    file = folder / "figures.jsonl"
    for seed in seeds:
        for way in ("plain", "patched", "command"):
            record = {"seed": seed, "way": way, **run(folder, way, seed, checkout)}
            with open(file, "a") as out:
                out.write(json.dumps(record) + "\n")
            print(record, flush=True)


if __name__ == "__main__":
    main()
