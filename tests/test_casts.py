"""Weights of frozen models under autocast: cast once, and the numbers are autocast's own."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_ins import wave
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kiop_fast.source import Source, fingerprint

IMAGES = wave(4, 3, 16, 16)


def half() -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are cast inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.seen[args[0].shape] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def source(make_source: Callable[..., Source]) -> Source:
    return make_source("resnet8", "letters")


def test_the_numbers_are_those_of_autocast(source: Source) -> None:
    leaf = IMAGES.clone().requires_grad_()
    with half():
        plain, ours = source.model(leaf), source.logits(leaf)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    grads = [torch.autograd.grad(out.float().square().sum(), leaf)[0] for out in (plain, ours)]
    assert torch.equal(*grads)


def test_without_autocast_nothing_is_narrow(source: Source) -> None:
    assert torch.equal(source.logits(IMAGES), source.model(IMAGES))
    with half(), torch.autocast("cpu", enabled=False):
        assert source.logits(IMAGES).dtype == torch.float32


def test_a_weight_is_cast_once(source: Source) -> None:
    weights = {tuple(p.shape) for p in source.model.parameters() if p.dim() > 1}
    casts = []
    for run in (source.model, source.logits, source.logits):
        with half(), Casts() as counted:
            run(IMAGES)
        casts.append(sum(n for shape, n in counted.seen.items() if tuple(shape) in weights))
    assert casts[0] > 0
    assert casts[2] == 0


def test_other_statistics_take_no_casts_of_their_own(source: Source) -> None:
    weights = {tuple(p.shape) for p in source.model.parameters() if p.dim() > 1}
    beside = source.with_statistics(None)
    with half():
        source.logits(IMAGES)
        with Casts() as counted:
            beside.logits(IMAGES)
    assert not weights & {tuple(shape) for shape in counted.seen}


def test_the_model_keeps_its_own_weights(source: Source) -> None:
    before = dict(source.model.named_parameters())
    with half():
        source.logits(IMAGES)
        with pytest.raises(RuntimeError):
            source.logits(torch.zeros(1, 5, 16, 16))
    after = dict(source.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert fingerprint(source.model) == source.sha256


def test_running_out_of_memory_leaves_the_model_whole(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([False, False, True])

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls):
            raise torch.OutOfMemoryError("no memory")
        return plain(tensor, *args, **kwargs)

    fresh, plain = copy.deepcopy(source), Tensor.to
    monkeypatch.setattr(Tensor, "to", to)
    with half(), pytest.raises(torch.OutOfMemoryError):
        fresh.logits(IMAGES)
    monkeypatch.undo()
    fresh.check_unchanged()


def test_casts_made_in_inference_mode_serve_gradients(source: Source) -> None:
    fresh = copy.deepcopy(source)
    with torch.inference_mode(), half():
        fresh.logits(IMAGES)
    leaf = IMAGES.clone().requires_grad_()
    with half():
        assert torch.autograd.grad(fresh.logits(leaf).sum(), leaf)[0].any()


def test_doubles_are_left_alone_as_by_autocast(source: Source) -> None:
    fresh = copy.deepcopy(source)
    fresh.model.double()
    with half():
        assert fresh.logits(IMAGES.double()).dtype == fresh.model(IMAGES.double()).dtype


def test_copies_and_pickles_are_without_casts(source: Source) -> None:
    fresh = copy.deepcopy(source)
    before = len(pickle.dumps(fresh))
    with half():
        fresh.logits(IMAGES)
    assert len(pickle.dumps(fresh)) == before
    assert fresh.__dict__.keys() - copy.deepcopy(fresh).__dict__.keys() == {"_casts"}


def test_compiled_as_a_whole(source: Source) -> None:
    fresh = copy.deepcopy(source)
    compiled = torch.compile(fresh.logits, fullgraph=True, backend="eager")
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            assert compiled(IMAGES).dtype == precision


def test_a_model_that_was_laid_out_anew_is_cast_anew(source: Source) -> None:
    source = copy.deepcopy(source)
    source.model.to(memory_format=torch.contiguous_format)  # whatever a run has made of it

    def strides() -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()

        def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.add(module.weight.stride())  # type: ignore[union-attr, operator]

        convolution = next(m for m in source.model.modules() if isinstance(m, torch.nn.Conv2d))
        hook = convolution.register_forward_pre_hook(look)
        with half():
            source.logits(IMAGES)
        hook.remove()
        return found

    contiguous = strides()
    source.model.to(memory_format=torch.channels_last)
    assert strides() != contiguous
    source.model.to(memory_format=torch.contiguous_format)
    assert strides() == contiguous
