"""Running out of memory names what is large and what shrinks it."""

from __future__ import annotations

import pytest
import torch

from kiop_fast.errors import OutOfMemoryError
from kiop_fast.runtime.memory import explained_memory, largest_tensors


def test_the_largest_tensor_is_named_once() -> None:
    large = torch.empty(100_000, 1001)  # memory that nobody touches is not taken
    others = [torch.empty(100_000, columns) for columns in (501, 751)]
    views = [large[0], large.T, large[:10]]
    first, *rest = largest_tensors(3)
    assert first in ("(100000, 1001) float32, 400.4 MB", "(1001, 100000) float32, 400.4 MB")
    assert rest == ["(100000, 751) float32, 300.4 MB", "(100000, 501) float32, 200.4 MB"]
    del views, others


def test_an_allocation_that_cannot_be_is_explained() -> None:
    with pytest.raises(OutOfMemoryError, match="largest tensors") as error, explained_memory():
        torch.empty(1 << 50)
    text = str(error.value)
    for setting in ("head_width", "negatives", "batch", "rings", "--resume"):
        assert setting in text


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
