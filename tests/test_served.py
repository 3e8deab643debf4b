"""A prompt on its model: logits from first principles, batch independence, threads, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from artefacts import make, noise, tiny_target
from stand_ins import tiny_source
from torch import Tensor, nn
from torch.nn import functional as F

from kiop_fast.errors import ArtefactError, DataError
from kiop_fast.source import Source


@pytest.fixture
def target() -> Source:
    return tiny_target()


def test_served_logits_from_first_principles(target: Source) -> None:
    artefact = make(target, "running")
    grey = noise(3, 1, 8, 8)
    x = (grey.expand(-1, 3, -1, -1) - 0.1) / 0.3
    for side, ring in zip((11, 16), artefact.prompt().squares(), strict=True):
        left, right = (side - x.shape[-1] + 1) // 2, (side - x.shape[-1]) // 2
        inside = F.pad(torch.ones(x.shape[-2:]), (left, right, left, right))
        x = F.pad(x, (left, right, left, right)) + ring.sigmoid() * (1 - inside)
    expected = target.model(x)[:, [5, 0, 3, 2]]
    task = artefact.on(target).task("digits")
    assert task.classes == ("0", "1", "2", "3")
    assert task.side == 8
    assert not task.training
    torch.testing.assert_close(task(grey), expected, atol=1e-5, rtol=1e-5)
    # three equal channels are the same grey image; a tenth of 255 is the same uint8
    torch.testing.assert_close(task(grey.expand(-1, 3, -1, -1)), expected, atol=1e-5, rtol=1e-5)
    levels = (grey * 255).to(torch.uint8)
    torch.testing.assert_close(task(levels), task(levels.float() / 255))


@pytest.mark.parametrize("policy", ["calibrated", "running"])
@pytest.mark.parametrize("name", ["letters", "digits"])
def test_batch_independence(policy: str, name: str, target: Source) -> None:
    task = make(target, policy).on(target).task(name)
    images = noise(64, 3, 8, 8)
    whole = task(images)
    for batch in (1, 7, 64):
        parts = torch.cat([task(part) for part in images.split(batch)])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(task(images[order]), whole[order], atol=1e-5, rtol=0)


def test_no_such_policy(target: Source) -> None:
    with pytest.raises(ArtefactError, match="did you mean calibrated"):
        make(target).on(target, batchnorm="Calibrated")


def test_under_policy_batch_the_batch_matters(target: Source) -> None:
    task = make(target, "batch").on(target).task("letters")
    images = noise(8, 3, 8, 8)
    assert not torch.allclose(task(images)[:1], task(images[:1]), atol=1e-3)


@pytest.mark.parametrize("policy", ["calibrated", "batch"])
def test_tasks_of_one_model_in_threads_of_their_own(policy: str, target: Source) -> None:
    """Both are inside the model at once; logits are those of each alone."""
    served = make(target, policy).on(target)
    images = noise(16, 3, 8, 8)
    tasks = [served.task(name) for name in served.names]
    expected = [task(images) for task in tasks]
    meeting = Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        meeting.wait()

    inside = target.model.register_forward_pre_hook(meet)
    tasks = [served.task(name) for name in served.names]  # the hook goes with the model
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda task: [task(images) for _ in range(20)], tasks))
    inside.remove()
    for given, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(logits, wanted) for logits in given)


def test_serving_leaves_the_model_as_it_was(target: Source) -> None:
    for policy in ("calibrated", "running", "batch"):
        task = make(target, policy).on(target).task("letters").train()
        expected = task(noise(4, 3, 8, 8))
        target.model.train()  # whoever else has the model
        assert torch.equal(task(noise(4, 3, 8, 8)), expected)
        target.model.eval()
    target.check_unchanged()


def test_another_dtype_and_a_bare_module(target: Source) -> None:
    artefact, model = make(target), target.model
    images = noise(4, 3, 8, 8)
    expected, own = artefact.on(model).task("letters")(images), model(images)
    task = artefact.on(model, check=False).task("letters").double()
    assert task(images).dtype == torch.float64
    torch.testing.assert_close(task(images).float(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images), own)  # A's weights are as they were


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_task_leaves_python(how: str, target: Source) -> None:
    """A program of another batch size than it was made with; a grey and a windowed task."""
    task, images = make(target).on(target).task("digits"), noise(5, 1, 8, 8)
    made: Callable[[Tensor], Tensor]
    if how == "trace":
        made = torch.jit.trace(task, images[:2])
    else:
        sizes = ({0: torch.export.Dim("images")},)
        made = torch.export.export(task, (images[:2],), dynamic_shapes=sizes).module()
    torch.testing.assert_close(made(images), task(images))


@pytest.mark.parametrize("policy", ["calibrated", "running", "batch"])
def test_tasks_have_the_weights_in_common(policy: str, target: Source) -> None:
    served = make(target, policy).on(target)
    for task in map(served.task, served.names):
        found = dict(task.model.named_parameters())
        assert found.keys() == dict(target.model.named_parameters()).keys()
        assert all(found[name] is own for name, own in target.model.named_parameters())


def test_another_model_is_refused_unless_allowed(target: Source) -> None:
    artefact, other = make(target), tiny_source("letters", 6, seed=2)
    with pytest.raises(ArtefactError, match=r"(?s)not the model.*sha256"):
        artefact.on(other)
    assert artefact.on(other, check=False).task("digits")(noise(2, 1, 8, 8)).shape == (2, 4)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ArtefactError, match="do not fit this model"):
        artefact.on(plain, check=False).task("digits")


def test_another_policy_on_request(target: Source) -> None:
    calibrated, running = make(target), make(target, "running")
    images = noise(4, 3, 8, 8)
    asked = calibrated.on(target, batchnorm="running").task("letters")(images)
    assert torch.equal(asked, running.on(target).task("letters")(images))
    with pytest.raises(ArtefactError, match="no calibrated"):
        running.on(target, batchnorm="calibrated").task("letters")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 9, 9), r"\(N, 3, 8, 8\)"),
        (torch.rand(2, 2, 8, 8), r"\(N, 1, 8, 8\)"),
        (torch.rand(3, 8, 8), r"got: .*\(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8"),
    ],
)
def test_wrong_images(images: Tensor, message: str, target: Source) -> None:
    with pytest.raises(DataError, match=message):
        make(target).on(target).task("letters")(images)
