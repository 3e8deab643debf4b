"""The reference room: its stores, and that it costs what upstream costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_ins import tiny_source, wave

from kiop_fast import reference
from kiop_fast.config import StoringConfig, SynthesisConfig
from kiop_fast.errors import MappingError
from kiop_fast.prompt import Prompt, PromptedModel
from kiop_fast.reference import storing, views
from kiop_fast.store import Term, draw_storing
from kiop_fast.synthesize import draw_synthesis

CPU = torch.device("cpu")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_one_png_an_image(channels: int, mode: str, tmp_path: Path) -> None:
    pictures = (torch.arange(3 * channels * 64) * 41 % 256).view(3, channels, 8, 8).byte()
    bank = reference.ImageBank(channels, 8, CPU, folder=tmp_path / "new" / "folder")
    bank.add(pictures, torch.arange(3))
    names = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    with Image.open(bank.files[1]) as picture:
        assert (picture.mode, picture.size) == (mode, (8, 8))
    assert torch.equal(bank.images, pictures)


def test_an_old_folder_is_never_mixed_in(tmp_path: Path) -> None:
    old = reference.ImageBank(1, 8, CPU, folder=tmp_path)
    old.add(torch.full((5, 1, 8, 8), 7, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    new = reference.ImageBank(1, 8, CPU, folder=tmp_path)
    assert len(new) == len(new.images) == 0
    new.add(torch.full((2, 1, 8, 8), 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert new.images.unique().tolist() == [9]
    assert len(new.images) == 2


def test_a_temporary_folder_goes_with_its_bank() -> None:
    bank = reference.ImageBank(1, 8, CPU)
    folder = bank.folder
    assert folder.exists()
    del bank
    assert not folder.exists()


def test_the_feature_bank_is_in_host_memory() -> None:
    bank = reference.FeatureBank(4, 3)
    bank.add(wave(6, 6))
    assert bank.rows.device == CPU
    local, global_ = bank.pairs()
    assert torch.equal(torch.cat([local, global_], 1), wave(6, 6)[[4, 5, 2, 3]])
    bank.pairs()[0].zero_()  # a gathered copy, as upstream's
    assert bank.rows.all()


def test_views_are_crops_of_the_image() -> None:
    images = wave(3, 2, 8, 8)
    same = torch.tensor([[1, 1]] * 3)
    stay = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(views.global_view(images, same, stay, 1), images)
    assert torch.equal(views.global_view(images, same, ~stay, 1), images.flip(3))
    corner = views.global_view(images, torch.tensor([[0, 2]] * 3), stay, 1)
    assert torch.equal(corner[:, :, 1:, :-1], images[:, :, :-1, 1:])
    assert not corner[:, :, 0].any()
    assert not corner[..., -1].any()
    whole = torch.tensor([[0, 0, 8, 8]] * 3)
    assert torch.equal(views.local_view(images, whole, stay), images)
    one = torch.tensor([[2, 5, 1, 1]] * 3)
    assert torch.equal(
        views.local_view(images, one, stay), images[:, :, 2:3, 5:6].expand(-1, -1, 8, 8)
    )


def test_resizing_aligns_corners() -> None:
    """Output i of 8 samples a side of n pixels at i (n − 1) / 7: a linear ramp stays one."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    view = views.local_view(ramp, torch.tensor([[0, 2, 5, 4]]), torch.tensor([False]))
    torch.testing.assert_close(view[0, 0, 3], torch.linspace(2.0, 5.0, 8))
    view = views.local_view(ramp, torch.tensor([[0, 2, 5, 4]]), torch.tensor([True]))
    torch.testing.assert_close(view[0, 0, 3], torch.linspace(5.0, 2.0, 8))


def test_the_teacher_takes_useless_gradients_in_a_private_copy() -> None:
    """Upstream's cost: weight gradients of the teacher, two passes a step, one for the student."""
    teacher, target = tiny_source("t", 5, 0), tiny_source("a", 6, 1)
    config = SynthesisConfig(batch=4, steps=2, latent=6, width=3, pad=1)
    made = reference.Synthesizer(
        teacher, config, teacher.info, side=8, bank_rows=8, seed=0, task="t", device=CPU
    )
    passes: list[tuple[int, ...]] = []
    made.model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    drawn = draw_synthesis(config, teacher, 8, seed=0, epoch=0, task="t", call=0, stored=0)
    made.synthesize(drawn, target.model, torch.tensor([1, 0, 3, 2, 5]))
    assert passes == [(4, 3, 8, 8)] * 4
    assert all(p.grad is not None and p.grad.any() for p in made.model.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())
    teacher.check_unchanged()
    for p, q in zip(made.model.parameters(), teacher.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loader_processes_start_anew_each_time_the_bank_is_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []

    class Counted(storing.DataLoader):  # type: ignore[misc, type-arg]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            started.append(settings["num_workers"])
            super().__init__(*arguments, **{**settings, "num_workers": 0})

    monkeypatch.setattr(storing, "DataLoader", Counted)
    source = tiny_source("p", 4, 0)
    bank = reference.ImageBank(3, 8, CPU)
    bank.add(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    drawn = draw_storing(StoringConfig(steps=7), source.info, 9, 4, seed=0, epoch=0, task="p")
    term = Term("p", 1.0, bank, source, False, lambda images: None)  # type: ignore[arg-type, return-value]
    assert len(list(storing._batches(term, drawn))) == 7
    assert started == [4, 4, 4]  # 3 batches go through 9 images; upstream has 4 workers


@pytest.mark.parametrize("policy", ["batch", "running"])
def test_prompted_model_equals_the_fast_one(policy: str) -> None:
    target, prompt = tiny_source("a", 6, 1), Prompt(8, (11, 16))
    mapping, images = torch.tensor([4, 0, 5]), wave(4, 3, 8, 8)
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(wave(*cells.shape, pace=0.7 + k))
    made = [
        kind(target, prompt, 2, mapping, batchnorm=policy)
        for kind in (PromptedModel, reference.ReferencePromptedModel)
    ]
    torch.testing.assert_close(made[1](images), made[0](images))
    torch.testing.assert_close(made[1](images), made[1].logits(images)[:, mapping])
    with pytest.raises(MappingError):
        reference.ReferencePromptedModel(target, prompt, 2, torch.tensor([6]))
