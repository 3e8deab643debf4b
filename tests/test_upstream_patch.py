"""The patch: what it takes, what it refuses, what it gives back; on a stand-in of the checkout.

The stand-in has the published names and arguments; its bodies are placeholders of our own.  The
authors' code itself is run beside ours in test_beside_upstream.py.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import TinyNet, fill_with_waves
from torch import nn
from torchvision import transforms as T

from kiop_fast import accelerate_upstream
from kiop_fast.dropin.fast_pool import Batches
from kiop_fast.dropin.patching import accelerated_calls
from kiop_fast.dropin.signatures import CMI, KIOP
from kiop_fast.errors import ConfigError, UpstreamError
from kiop_fast.patch import main
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


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable stand-in; forgotten afterwards."""
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


def test_kiops_synthesizer(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    synthesis = importlib.import_module("datafree.synthesis")
    one = synthesizer(synthesis, cn=3)
    assert isinstance(one, synthesis.CMISynthesizer)
    names = [n for n in KIOP if n not in ("feature_layers", "head_dim")]
    assert all(hasattr(one, name) for name in [*names, "head", "mem_bank", "data_pool", "aug"])
    teacher_grads = [p.requires_grad for p in one.teacher.parameters()]
    made, view, targets = one.synthesize()
    assert [p.requires_grad for p in one.teacher.parameters()] == teacher_grads
    assert one.student.training
    assert not one.teacher.training
    images = made["synthetic"]
    assert images.shape == view.shape == (6, 3, 8, 8)
    assert targets.tolist() == sorted(targets.tolist())
    stored = np.stack([np.array(Image.open(f"run/0-{i}.png")) for i in range(6)])
    again = (images.clamp(0, 1).numpy() * 255).astype("uint8").transpose(0, 2, 3, 1)
    assert np.array_equal(again, stored)  # what the script saves from the return value
    given = torch.tensor([4, 0, 1, 1, 2, 3])
    assert one.synthesize(given)[2].tolist() == given.tolist()
    assert (one.mem_bank.n_updates, one.mem_bank._ptr) == (12, 12)
    assert one.mem_bank.get_data(5)[0].shape == (5, one.mem_bank.dim_feat)
    sizes = [len(one.sample()) for _ in range(4)]
    assert sizes == [4, 4, 4, 4]  # 12 images: three full batches, then the next epoch
    assert sum(view.shape[0] for view in one.aug(images)) == 12
    assert accelerated_calls()["CMISynthesizer.synthesize"] == 2


def test_a_seed_decides_the_images(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    synthesis = importlib.import_module("datafree.synthesis")
    found = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed)
        one = synthesizer(synthesis, cn=3, save_dir=folder)
        found.append((one.synthesize()[0]["synthetic"], one.sample()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_cmis_signature(checkout: Path) -> None:
    """No ``cn``, a dict, no visual prompt: CMI's own repository."""
    write_checkout(checkout, CMI, prompt=False)
    accelerate_upstream()
    synthesis = importlib.import_module("datafree.synthesis")
    made = synthesizer(synthesis).synthesize()
    assert list(made) == ["synthetic"]
    assert made["synthetic"].shape == (6, 3, 8, 8)


def test_the_loss_and_its_class(checkout: Path) -> None:
    write_checkout(checkout)
    criterions = importlib.import_module("datafree.criterions")
    a, b = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    plain = [criterions.KLDiv(T=3.0, reduction=r)(a, b) for r in ("batchmean", "sum", "none")]
    grads = torch.autograd.grad(plain[0], (a, b))
    accelerate_upstream()
    ours = [criterions.KLDiv(T=3.0, reduction=r)(a, b) for r in ("batchmean", "sum", "none")]
    for x, y in zip(plain, ours, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(grads, torch.autograd.grad(ours[0], (a, b)), strict=True):
        torch.testing.assert_close(x, y)
    assert accelerated_calls()["kldiv"] == 2  # "none" is theirs
    assert sys.modules["datafree.synthesis"].kldiv is criterions.kldiv  # imported by name


@pytest.mark.parametrize("odd", [False, True])
def test_the_prompt(checkout: Path, odd: bool) -> None:
    write_checkout(checkout)
    prompts = importlib.import_module("visual_prompt")
    inner, outer = (8, 13 if odd else 12)
    layer = prompts.ExpansiveVisualPrompt(outer, mask=np.zeros((inner, inner)))
    with torch.no_grad():
        layer.program.copy_(torch.randn(3, outer, outer))
    x, weight = torch.randn(2, 3, inner, inner, requires_grad=True), torch.randn(2, 3, outer, outer)
    plain = layer(x)
    grads = torch.autograd.grad((plain * weight).sum(), (layer.program, x))
    keys = list(layer.state_dict())
    accelerate_upstream()
    seen = layer(x)  # one that was made before; and one that is made now
    fresh = prompts.ExpansiveVisualPrompt(outer, mask=np.zeros((inner, inner)))
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), plain)
    torch.testing.assert_close(seen, plain)
    for a, b in zip(
        grads, torch.autograd.grad((seen * weight).sum(), (layer.program, x)), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert list(layer.state_dict()) == keys
    assert accelerated_calls()["ExpansiveVisualPrompt"] == 2
    same = prompts.ExpansiveVisualPrompt(8, mask=np.zeros((8, 8)))
    assert torch.equal(same(x), x)  # no border: theirs
    holes = np.zeros((8, 8))
    holes[3, 3] = 1
    assert prompts.ExpansiveVisualPrompt(12, mask=holes)(x)[0, 0, 5, 5] == x[0, 0, 3, 3] + 0.5


def test_undoing(checkout: Path) -> None:
    write_checkout(checkout)
    modules = [
        importlib.import_module(f"datafree.{n}") for n in ("criterions", "utils", "synthesis")
    ]
    modules.append(importlib.import_module("visual_prompt"))

    def everything() -> list[Any]:
        found = [(n, v) for m in modules for n, v in sorted(vars(m).items()) if n[:2] != "__"]
        return [(n, v, dict(vars(v)) if isinstance(v, type) else None) for n, v in found]

    before = everything()
    accelerate_upstream()
    assert everything() != before
    accelerate_upstream()  # twice is once
    accelerate_upstream(False)
    assert everything() == before
    accelerate_upstream(False)


def test_the_pool(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    utils = importlib.import_module("datafree.utils")
    pool = utils.ImagePool("run/x")
    images = torch.rand(3, 3, 8, 8)
    pool.add(images, 3)
    utils.ImagePool("run/grey").add(images, 1)
    bytes_ = (images.numpy() * 255).astype("uint8")
    assert np.array_equal(np.array(Image.open("run/x/0-2.png")).transpose(2, 0, 1), bytes_[2])
    assert Image.open("run/grey/0-0.png").mode == "L"
    other = utils.ImagePool("run/y")
    assert len(other.get_dataset()) == 0
    with pytest.raises(ConfigError, match="share one folder"):
        utils.ImagePool("run/y")
    (checkout / "old").mkdir()
    Image.new("L", (4, 4)).save(checkout / "old" / "0-0.png")
    with pytest.raises(ConfigError, match="not empty"):
        utils.ImagePool(str(checkout / "old"))


TRANSFORMS = {
    "cifar": T.Compose([T.RandomCrop(8, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                        T.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]),
    "gtsrb": T.Compose([T.Resize((8, 8)), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]),
    "mnist": T.Compose([T.ToTensor(), T.Resize((8, 8)), T.Lambda(lambda x: x.repeat(3, 1, 1))]),
    "plain": T.ToTensor(),
    "unknown": T.Compose([T.GaussianBlur(3, sigma=1.0), T.ToTensor()]),
    "no batch": T.Compose([T.ToTensor(), T.Lambda(lambda x: x if float(x[0, 0, 0]) >= 0 else -x)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_batches_are_what_the_transform_makes(name: str) -> None:
    """Those without chance, picture by picture; cifar's by its crops' and flips' outcomes."""
    transform = TRANSFORMS[name]
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    given = T.Compose([transform]) if name == "plain" else transform
    batches = Batches(pixels, given, 2, torch.device("cpu"), order=torch.arange)
    assert (batches.plan is None) == (name in ("unknown", "no batch"))
    got = [batches.next() for _ in range(4)]
    assert [len(b) for b in got] == [2, 2, 1, 2]
    if name == "cifar":
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        frame = nn.functional.pad(pixels[0].float() / 255, (4, 4, 4, 4))
        crops = [frame[:, t : t + 8, x : x + 8] for t in range(9) for x in range(9)]
        possible = [(w - mean) / std for crop in crops for w in (crop, crop.flip(2))]
        assert min(float((got[0][0] - p).abs().max()) for p in possible) < 1e-5
        return
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    wanted = torch.stack([transform(picture) for picture in pictures])
    torch.testing.assert_close(torch.cat(got[:3]), wanted, rtol=1e-5, atol=1e-6)


def test_images_given_join_the_batches(checkout: Path) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    (checkout / "given").mkdir()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(checkout / "given" / "w.png")
    one = synthesizer(importlib.import_module("datafree.synthesis"), cn=3,
                      init_dataset=str(checkout / "given"), sample_batch_size=7)  # fmt: skip
    one.synthesize()
    batch = one.sample()
    white = (1 - 0.4) / 0.3
    assert len(batch) == 7
    assert sum(bool(((image - white).abs() < 1e-5).all()) for image in batch) >= 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"feature_layers": []}, "feature_layers"),
        ({"img_size": (1, 8, 8)}, "images of"),
        ({"generator": nn.Linear(2, 2)}, "another generator"),
        ({"teacher": nn.Linear(2, 2)}, "without BatchNorm"),
        ({"distributed": True}, "distributed"),
        ({"normalizer": None}, "normalizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ours_cannot_do_runs_as_theirs(
    change: dict[str, Any], why: str, checkout: Path
) -> None:
    write_checkout(checkout)
    accelerate_upstream()
    with pytest.warns(UserWarning, match=f"runs as it was: .*{why}"):
        one = synthesizer(importlib.import_module("datafree.synthesis"), cn=3, **change)
    assert one.theirs
    assert one.synthesize() == "theirs"
    assert "CMISynthesizer.synthesize" not in accelerated_calls()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cr_T", "temperature", "CMISynthesizer lacks cr_T and adds temperature"),
        ("def add(self, imgs, cn, ", "def add(self, cn, imgs, ", "ImagePool.add has another order"),
        ("def get_dataset", "def dataset", "ImagePool.get_dataset is missing"),
        ("def __init__(self, T=1.0, ", "def __init__(self, ", "KLDiv lacks T"),
        ("init=\"zero\", ", "", "ExpansiveVisualPrompt lacks init"),
        ("class ExpansiveVisualPrompt", "class Another", "ExpansiveVisualPrompt is missing"),
    ],
)  # fmt: skip
def test_another_version_is_refused_by_its_names(
    old: str, new: str, said: str, checkout: Path
) -> None:
    write_checkout(checkout)
    for file in checkout.rglob("*.py"):
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UpstreamError) as error:
        accelerate_upstream()
    assert said in str(error.value)
    assert "theirs" in importlib.import_module("datafree.utils").ImagePool.add.__code__.co_consts


def test_no_checkout(checkout: Path) -> None:
    with pytest.raises(UpstreamError, match="'datafree' cannot be imported"):
        accelerate_upstream()


def test_the_program(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkout(checkout)
    (checkout / "script.py").write_text(
        textwrap.dedent("""
        import sys, torch, numpy as np
        import datafree
        from visual_prompt import ExpansiveVisualPrompt
        if __name__ == "__main__":
            print(sys.argv[1:], datafree.criterions.KLDiv()(torch.ones(2, 3), torch.ones(2, 3)))
            ExpansiveVisualPrompt(12, np.zeros((8, 8)))(torch.zeros(1, 3, 8, 8))
    """)
    )
    before = list(sys.argv)
    assert main([str(checkout / "script.py"), "--lr", "0.8"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("['--lr', '0.8'] tensor(0.")
    assert "accelerated calls: ExpansiveVisualPrompt 1, kldiv 1" in said.err
    assert sys.argv == before
    assert main([str(checkout / "nothing.py")]) == 2
    assert "no such script" in capsys.readouterr().err
    assert main([]) == 2
