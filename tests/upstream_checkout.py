"""A miniature stand-in of the authors' checkout: their names and arguments, bodies of our own.

None of this is the authors' code: the small classes below were written for these tests, as
placeholders that a patch can find, replace and give back.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_ins import TinyNet, fill_with_waves
from torch import nn
from torchvision import transforms as T

from kiop_fast import accelerate_upstream
from kiop_fast.dropin.signatures import KIOP
from kiop_fast.synthesize import Generator

CRITERIONS = """
import torch
from torch import nn
def kldiv(logits, targets, T=1.0, reduction="batchmean"):
    p, q = (targets / T).softmax(1), (logits / T).softmax(1)
    rows = p * (p / q).log() * T * T
    return {"batchmean": rows.sum() / len(rows), "sum": rows.sum(), "none": rows}[reduction]
class KLDiv(nn.Module):
    def __init__(self, T=1.0, reduction="batchmean"):
        super().__init__()
        self.T, self.reduction = T, reduction
    def forward(self, logits, targets):
        return kldiv(logits, targets, T=self.T, reduction=self.reduction)
"""
UTILS = """
import os
class ImagePool:
    def __init__(self, root):
        self.root, self._idx = os.path.abspath(root), 0
        os.makedirs(self.root, exist_ok=True)
    def add(self, imgs, {cn}targets=None):
        raise RuntimeError("theirs")
    def get_dataset(self, transform=None, labeled=True):
        raise RuntimeError("theirs")
class UnlabeledImageDataset:
    def __init__(self, root, transform=None):
        from PIL import Image
        self.images = [os.path.join(root, f) for f in sorted(os.listdir(root))]
        self.open, self.transform = Image.open, transform
    def __len__(self):
        return len(self.images)
    def __getitem__(self, i):
        return self.transform(self.open(self.images[i]))
class Normalizer:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std
"""
SYNTHESIS = """
from datafree.criterions import kldiv
class CMISynthesizer:
    def __init__(self, {names}):
        self.theirs, self.data_iter = True, None
    def synthesize(self, targets=None):
        return "theirs"
    def sample(self):
        return self.data_iter.next()
"""
PROMPT = '''
import numpy as np, torch
from torch import nn
class ExpansiveVisualPrompt(nn.Module):
    def __init__(self, out_size, mask, init="zero", normalize=None):
        super(ExpansiveVisualPrompt, self).__init__()
        inner = mask.shape[0]
        self.out_size, self.normalize = out_size, normalize
        self.l_pad, self.r_pad = (out_size - inner + 1) // 2, (out_size - inner) // 2
        self.program = nn.Parameter(torch.zeros(3, out_size, out_size))
        sides = (self.l_pad, self.r_pad) * 2
        border = nn.functional.pad(torch.tensor(mask, dtype=torch.float32), sides, value=1.0)
        self.register_buffer("mask", border.expand(3, -1, -1).clone())
    def forward(self, x):
        sides = (self.l_pad, self.r_pad) * 2
        return nn.functional.pad(x, sides) + torch.sigmoid(self.program) * self.mask
'''  # fmt: skip
OPTIONAL = {"feature_layers", "init_dataset", "transform", "autocast", "normalizer"}
NUMBERS = {"cn": 1, "bank_size": 64, "n_neg": 32, "head_dim": 8, "iterations": 3, "lr_g": 0.05,
           "synthesis_batch_size": 6, "sample_batch_size": 4, "adv": 0.5, "bn": 1, "oh": 1,
           "cr": 0.8, "cr_T": 0.6, "save_dir": "run", "device": "cpu"}  # fmt: skip


def write_checkout(folder: Path, names: tuple[str, ...] = KIOP, prompt: bool = True) -> None:
    plain = names[:6]
    rest = [f"{n}={NUMBERS.get(n, None if n in OPTIONAL else False)!r}" for n in names[6:]]
    package = folder / "datafree"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import criterions, utils, synthesis\n")
    (package / "criterions.py").write_text(CRITERIONS)
    (package / "utils.py").write_text(UTILS.replace("{cn}", "cn, " if "cn" in names else ""))
    (package / "synthesis.py").write_text(SYNTHESIS.replace("{names}", ", ".join([*plain, *rest])))
    if prompt:
        (folder / "visual_prompt.py").write_text(PROMPT)


def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on the import path for ``write_checkout``; forgotten afterwards."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    accelerate_upstream(False)
    for name in [n for n in sys.modules if n.split(".")[0] in ("datafree", "visual_prompt")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def waves(classes: int) -> nn.Module:
    net = TinyNet(classes)
    fill_with_waves(net)
    return net


def synthesizer(module: Any, **change: Any) -> Any:
    normalizer = sys.modules["datafree.utils"].Normalizer((0.4,), (0.3,))
    given = {
        "teacher": waves(5),
        "student": waves(5),
        "generator": Generator(12, 4, 8, 3),
        "nz": 12,
        "num_classes": 5,
        "img_size": (3, 8, 8),
        "normalizer": normalizer,
        "transform": T.Compose([T.ToTensor(), T.Normalize((0.4,) * 3, (0.3,) * 3)]),
    }
    return module.CMISynthesizer(**{**given, **change})
