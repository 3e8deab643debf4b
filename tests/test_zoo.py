"""Source models by name: parameter counts, sides, initial weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kiop_fast.errors import SourceError
from kiop_fast.source import (
    build,
    fingerprint,
    names,
    zoo,
)

CPU = torch.device("cpu")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_count(blocks: int, classes: int) -> int:
    """Convolutions 9·in·out, two numbers a BatchNorm channel, 1x1 shortcuts with BatchNorm."""
    total, inside = 27 * 16 + 32, 16
    for outside in (16, 32, 64):
        for _ in range(blocks):
            total += 9 * inside * outside + 9 * outside**2 + 4 * outside
            total += inside * outside + 2 * outside if inside != outside else 0
            inside = outside
    return total + 64 * classes + classes


def wide_count(depth: int, width: int, classes: int) -> int:
    """Pre-activation blocks: BatchNorm of the input and of the middle; bare 1x1 shortcuts."""
    total, inside = 27 * 16, 16
    for outside in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 2 * inside + 9 * inside * outside + 2 * outside + 9 * outside**2
            total += inside * outside if inside != outside else 0
            inside = outside
    return total + 2 * inside + inside * classes + classes


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("resnet8", resnet_count(1, 10)),
        ("resnet20", 272_474),  # He et al.'s 269,722 plus two 1x1 shortcuts with BatchNorm
        ("resnet20", resnet_count(3, 10)),
        ("wrn_16_1", wide_count(16, 1, 10)),
        ("wrn_40_2", 2_243_546),  # as published for WRN-40-2
        ("wrn_40_2", wide_count(40, 2, 10)),
        ("resnet18", 11_181_642),  # torchvision: 11,689,512 less 513,000 plus 5,130
    ],
)
def test_parameter_counts(arch: str, count: int) -> None:
    assert parameters(build(arch, 10, 32)) == count


@pytest.mark.parametrize("arch", ["resnet8", "resnet20", "wrn_16_1", "wrn_40_2"])
@pytest.mark.parametrize("side", [8, 15, 36])
def test_small_nets_take_any_canvas(arch: str, side: int) -> None:
    model = build(arch, 43, [8, side]).eval()
    assert model(torch.rand(1, 3, side, side)).shape == (1, 43)


@pytest.mark.parametrize(
    "arch", ["resnet50", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet"]
)
def test_torchvision_classifiers_with_a_new_head(arch: str) -> None:
    model = build(arch, 7, [32, 40]).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_upstream_architecture_has_upstreams_keys() -> None:
    with torch.device("meta"):
        keys = zoo._make("vgg13_bn", 10).state_dict()
    assert keys["classifier.6.weight"].shape == (10, 4096)


def test_names_hold_both_families() -> None:
    assert {"resnet8", "wrn_40_2", "resnet18", "resnet50", "resnet101", "vgg13_bn"} <= set(names())


@pytest.mark.parametrize(
    ("arch", "sides", "reason"),
    [
        ("inception_v3", 32, "Kernel size"),
        ("vit_b_16", 32, "Wrong image height"),
        ("vgg13_bn", [32, 16], "images of 16 pixels"),
        ("maxvit_t", 32, "RuntimeError"),
    ],
)
def test_models_that_do_not_take_the_side(arch: str, sides: int | list[int], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        build(arch, 10, sides)


def test_unknown_architecture_names_close_matches() -> None:
    with pytest.raises(SourceError, match=r"did you mean .*resnet18"):
        build("resnet19", 10, 32)


@pytest.mark.parametrize("arch", ["resnet8", "resnet18"])
def test_initial_weights_come_from_the_seed_alone(arch: str) -> None:
    torch.manual_seed(5)
    first, state = fingerprint(build(arch, 10, 32, seed=3)), torch.random.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert fingerprint(build(arch, 10, 32, seed=3)) == first
    assert fingerprint(build(arch, 10, 32, seed=4)) != first
