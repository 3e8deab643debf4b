"""Rings and BatchNorm policies: against formulas written here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import MappingError, PromptError
from kiop_fast.prompt import (
    Prompt,
    PromptedModel,
    calibrate,
)
from kiop_fast.source import DropoutDraws, Source, batch_statistics, freeze

Make = Callable[..., Source]


def filled(prompt: Prompt) -> Prompt:
    """Cells that are all different."""
    with torch.no_grad():
        for k, cells in enumerate(prompt.cells):
            cells.copy_(torch.sin(torch.arange(cells.numel()) * 0.7 + k).view_as(cells) * 3)
    return prompt


def test_the_papers_setting_has_46080_cells() -> None:
    """3 (36² - 32²) + 3 (128² - 36²), SPEC section 2; the paper says roughly 50K."""
    prompt = Prompt(32, (36, 128))
    assert sum(cells.numel() for cells in prompt.cells) == 46080
    assert all(not cells.any() for cells in prompt.cells)


@pytest.mark.parametrize(("side", "rings"), [(16, (20, 28)), (16, (19, 24, 31)), (31, (32, 37))])
def test_forward_is_nested_padding_plus_sigmoid(side: int, rings: tuple[int, ...]) -> None:
    prompt = filled(Prompt(side, rings))
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = images
    for outer, square in zip(rings, prompt.squares(), strict=True):
        inner = expected.shape[-1]
        near, far = (outer - inner + 1) // 2, (outer - inner) // 2
        mask = F.pad(torch.zeros(inner, inner), (near, far, near, far), value=1.0)
        expected = F.pad(expected, (near, far, near, far)) + torch.sigmoid(square) * mask
    torch.testing.assert_close(prompt(images), expected, rtol=0, atol=0)


def test_untouched_cells_are_a_flat_half() -> None:
    picture = Prompt(8, (12,)).picture()
    assert picture[:, 2:10, 2:10].eq(0).all()
    assert picture[:, :2].eq(0.5).all()


@pytest.mark.parametrize(("side", "rings"), [(16, ()), (16, (16,)), (16, (20, 20)), (16, (24, 20))])
def test_rings_must_nest(side: int, rings: tuple[int, ...]) -> None:
    with pytest.raises(PromptError, match="nest"):
        Prompt(side, rings)


def test_depth_must_exist() -> None:
    with pytest.raises(PromptError, match="no such depth"):
        Prompt(16, (20,))(torch.zeros(1, 3, 16, 16), depth=2)


def test_mapping_out_of_range(make_source: Make) -> None:
    target = make_source("resnet8", "digits")
    with pytest.raises(MappingError, match="does not have"):
        PromptedModel(target, Prompt(16, (20,)), 1, torch.tensor([3, 10]))


def test_policy_batch_normalises_with_the_batch_and_writes_nothing(make_source: Make) -> None:
    source = make_source("resnet8", "letters")
    images = torch.rand(6, 3, 20, 20)
    layer = next(m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d))
    seen = {}
    hook = layer.register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o.clone()))
    with batch_statistics(source.model):
        source.model(images)
    hook.remove()
    x = seen["x"]
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
    expected = (x - mean) / (var + layer.eps).sqrt() * weight + bias
    torch.testing.assert_close(seen["y"], expected)
    source.check_unchanged()
    assert not layer.training


def one_layer() -> Source:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    )  # fmt: skip
    info = DatasetInfo("five", 8, 3, tuple("abcde"))
    return freeze(model, info, name="one layer", arch="one")


def test_calibration_pools_mean_and_variance_exactly() -> None:
    """One BatchNorm layer: statistics over all images, however they are chunked."""
    source, prompt = one_layer(), filled(Prompt(8, (12,)))
    images = torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 3 + 5
    statistics = calibrate(PromptedModel(source, prompt, 1), images, batch=7)
    with torch.no_grad():
        x = source.model[0](prompt(images)).double()
    torch.testing.assert_close(statistics["1.running_mean"].double(), x.mean((0, 2, 3)))
    expected = x.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(statistics["1.running_var"].double(), expected)


def test_calibrated_statistics_are_used(make_source: Make) -> None:
    source, prompt = make_source("resnet8", "letters"), filled(Prompt(16, (20,)))
    images = torch.rand(16, 3, 16, 16)
    statistics = calibrate(PromptedModel(source, prompt, 1), images, batch=16)
    beside = source.with_statistics(statistics)
    with torch.no_grad():
        calibrated = PromptedModel(beside, prompt, 1, batchnorm="running")(images)
        batch = PromptedModel(source, prompt, 1, batchnorm="batch")(images)
        running = PromptedModel(source, prompt, 1, batchnorm="running")(images)
    torch.testing.assert_close(calibrated, batch, rtol=1e-4, atol=1e-4)
    assert (calibrated - running).abs().max() > 1e-2
    source.check_unchanged()


def test_dropout_that_stays_on_drops_by_its_draw() -> None:
    """Kept values are scaled by 1/(1-p); a name gives the same mask, another name another."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.25)).eval()
    ones = torch.ones(8, 3, 16, 16)
    with DropoutDraws(0, 1, "digits").active(model, "plain"):
        first, second = model(ones), model(ones)
    with DropoutDraws(0, 1, "digits").active(model, "plain"):
        assert torch.equal(model(ones), first)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(first, second)
    # 6,144 draws: the share dropped is within five standard deviations of p.
    assert abs(first.eq(0).double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 6144) ** 0.5
    assert torch.equal(model(ones), ones.flatten(1)), "off again outside"
