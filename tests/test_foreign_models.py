"""Models written by others, target and provider at once: what is taken, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kiop_fast import KiOP
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import SourceError
from kiop_fast.prompt import Prompt, PromptedModel, calibrate
from kiop_fast.source import freeze
from kiop_fast.source.classifier import trainable_copy
from kiop_fast.source.frozen import is_rowwise

SMALL: dict[str, Any] = {
    "side": 8, "epochs": 1, "prompt": {"rings": [10, 14], "calibration_batch": 4},
    "synthesis": {"batch": 4, "steps": 2, "width": 4, "latent": 8, "head_width": 8},
    "storing": {"steps": 2, "batch": 4},
}  # fmt: skip


class Flattened(nn.Module):
    """Maps of 2 × 2 and more into a classifier, by ``view``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.classify = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classify(x.view(x.size(0), -1))


class Perceptron(nn.Module):
    """A BatchNorm1d behind the maps."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Aided(Perceptron):
    """A head that only training needs; or one layer at two places."""

    def __init__(self, classes: int, shared: bool) -> None:
        super().__init__(classes)
        self.aid = nn.BatchNorm2d(6)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head((self.aid(self.aid(x)) if self.shared else x).mean((2, 3)))


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_model_that_views_its_maps(engine: str) -> None:
    target, provider, images = Flattened(7), Flattened(5), torch.rand(3, 3, 8, 8)
    prompt = KiOP(target, {"job": provider}, engine=engine, **SMALL).fit()
    for task in ("target", "job"):
        for given in (images, images.contiguous(memory_format=torch.channels_last)):
            logits = prompt.on(target).task(task)(given)
            assert logits.isfinite().all()
            each = [prompt.on(target).task(task)(image[None])[0] for image in images]
            torch.testing.assert_close(logits, torch.stack(each))


def test_its_trainable_copy_takes_the_same_images() -> None:
    """Mode vanilla hands its student channels-last batches."""
    info = DatasetInfo("seven", 8, 3, tuple("abcdefg"))
    source = freeze(Flattened(7), info, name="flattened", arch="flattened")
    student = trainable_copy(source, 5, np.random.default_rng(0))
    images = torch.rand(3, 3, 8, 8)
    found = student(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, student(images))
    assert found.shape == (3, 5)


def test_only_such_a_model_is_given_rows() -> None:
    assert is_rowwise(Flattened(5).eval(), 8)
    assert not is_rowwise(Perceptron(5).eval(), 8)
    assert not is_rowwise(nn.Linear(3, 4), 8)  # takes no images at all


def test_batchnorm_of_vectors_is_calibrated_as_well() -> None:
    """One chunk: eval mode with its statistics equals normalising with the batch's own."""
    info = DatasetInfo("seven", 8, 3, tuple("abcdefg"))
    source = freeze(Perceptron(7), info, name="perceptron", arch="perceptron")
    prompt, images = Prompt(8, (12,)), torch.rand(16, 3, 8, 8)
    seen = PromptedModel(source, prompt, 1)
    statistics = calibrate(seen, images, batch=16)
    assert set(statistics) == {
        f"{layer}.running_{part}" for layer in ("features.1", "head.1") for part in ("mean", "var")
    }
    beside = source.with_statistics(statistics)
    expected = PromptedModel(source, prompt, 1, batchnorm="batch")(images)
    found = PromptedModel(beside, prompt, 1, batchnorm="running")(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shared", "times"), [(False, "0 times"), (True, "2 times")])
def test_each_layer_runs_once(shared: bool, times: str) -> None:
    with pytest.raises(SourceError, match=rf"(?s)Aided.*'aid' {times}"):
        KiOP(Perceptron(7), {"job": Aided(5, shared)}, **SMALL).fit()


def test_a_layer_that_never_runs_keeps_its_statistics() -> None:
    model = Aided(7, shared=False)
    model.aid.running_mean.fill_(3.0)
    info = DatasetInfo("seven", 8, 3, tuple("abcdefg"))
    source = freeze(model, info, name="aided", arch="aided")
    statistics = calibrate(PromptedModel(source, Prompt(8, (12,)), 1), torch.rand(4, 3, 8, 8), 4)
    assert torch.equal(statistics["aid.running_mean"], torch.full((6,), 3.0))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # tracing is old, and still met
def test_wrappers_are_taken_off() -> None:
    target = Perceptron(7)
    prompt = KiOP(nn.DataParallel(target), {"job": torch.compile(Perceptron(5))}, **SMALL).fit()
    images = torch.rand(2, 3, 8, 8)
    expected = prompt.on(target).task("job")(images)
    assert torch.equal(prompt.on(torch.compile(target)).task("job")(images), expected)
    with pytest.raises(SourceError, match="scripted or traced"):
        KiOP(torch.jit.trace(target.eval(), images), {"job": Perceptron(5)}, **SMALL).fit()
