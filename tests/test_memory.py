"""Running out of memory names what is large and what shrinks it."""

from __future__ import annotations

import pytest
import torch

from kiop_fast.errors import OutOfMemoryError
from kiop_fast.runtime.memory import explained_memory, largest_tensors


def test_the_largest_tensor_is_named_once() -> None:
    large, smaller = torch.zeros(3000, 4001), [torch.zeros(1000, k) for k in (1000, 2000)]
    views = [large[0], large.T, large[:10]]
    named = largest_tensors(3)
    assert named[0] in ("(3000, 4001) float32, 48.0 MB", "(4001, 3000) float32, 48.0 MB")
    assert named[1:] == ["(1000, 2000) float32, 8.0 MB", "(1000, 1000) float32, 4.0 MB"]
    del views, smaller


def test_an_allocation_that_cannot_be_is_explained() -> None:
    with pytest.raises(OutOfMemoryError, match="largest tensors") as error, explained_memory():
        torch.empty(1 << 50)
    text = str(error.value)
    for setting in ("head_width", "negatives", "batch", "rings", "--resume"):
        assert setting in text


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
