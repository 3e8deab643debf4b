"""The patch: what it takes, what it refuses, what it gives back; on a stand-in of the checkout.

The authors' code itself is run beside ours in test_beside_upstream.py.
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
from torch import nn
from upstream_checkout import importable, synthesizer, write_checkout

from kiop_fast import accelerate_upstream
from kiop_fast.dropin.patching import accelerated_calls
from kiop_fast.dropin.signatures import CMI, KIOP
from kiop_fast.errors import UpstreamError
from kiop_fast.patch import main


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from importable(tmp_path, monkeypatch)


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
