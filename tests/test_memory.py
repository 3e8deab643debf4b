"""Running out of memory names what is large and what shrinks it."""

from __future__ import annotations

import pytest
import torch

from kiop_fast.errors import OutOfMemoryError
from kiop_fast.runtime.memory import explained_memory, largest_tensors


def test_each_tensor_is_named_once_the_largest_first() -> None:
    large, *others = (torch.zeros(1000, columns) for columns in (4001, 1001, 2003))
    views = [large[0], large.T, large[:10]]
    named = largest_tensors(10_000)
    sizes = [float(name.split()[-2]) for name in named]
    assert sizes == sorted(sizes, reverse=True)
    shapes = ("(1000, 4001)", "(4001, 1000)", "(1000, 2003)", "(1000, 1001)")
    mine = [name for name in named if name.startswith(shapes)]
    assert mine[0] in ("(1000, 4001) float32, 16.0 MB", "(4001, 1000) float32, 16.0 MB")
    assert mine[1:] == ["(1000, 2003) float32, 8.0 MB", "(1000, 1001) float32, 4.0 MB"]
    del views, others


def test_tensors_without_memory_are_passed_over() -> None:
    """What is traced or on ``meta`` takes none; what is expanded takes that of one row."""
    traced = torch._to_functional_tensor(torch.zeros(1000, 3001))
    assert type(traced) is torch.Tensor
    shape_only = torch.zeros(1000, 5001, device="meta")
    expanded = torch.zeros(1, 7001).expand(1000, 7001)
    named = largest_tensors(10_000)
    assert not [name for name in named if name.startswith("(1000, 5001)")]
    assert named.count("(1000, 3001) float32, 12.0 MB") == 1  # what the traced one stands for
    assert "(1000, 7001) float32, 0.0 MB" in named
    del traced, shape_only, expanded


def test_a_block_of_several_goes_by_its_largest() -> None:
    block = torch.zeros(8_004_000, dtype=torch.uint8)
    parts = [block[:4_000_000].view(torch.float32).view(1000, 1000), block[4_000_000:]]
    named = largest_tensors(10_000)
    assert "(1000, 1000) float32 and others, 8.0 MB" in named
    assert not [name for name in named if name.startswith("(8004000,)")]
    assert not largest_tensors(device="cuda")
    del parts


def test_an_allocation_that_cannot_be_is_explained() -> None:
    with pytest.raises(OutOfMemoryError, match="largest tensors") as error, explained_memory():
        torch.empty(1 << 50)
    text = str(error.value)
    for setting in ("head_width", "negatives", "batch", "rings", "--resume"):
        assert setting in text


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
