"""Both engines give the numbers of the authors' public code.

``data/upstream_values.json`` was made by hand, once, by running the unmodified functions of the
public repository (commit of its main branch in November 2026; kornia 0.9, torch 2.15, one CPU
thread, double precision) on the closed-form inputs of ``stand_ins.wave``: sines of an index, so
that no random number generator has a part in it.  Its entries:

prompt       three ExpansiveVisualPrompt in a row, sides 5 → 8 → 12 → 13, ``program`` a wave
generator    models.generator.Generator: parameter count; a small one's images in train mode
kl           criterions.KLDiv, with the gradients of both arguments
batchnorm    hooks.DeepInversionHook and InstanceMeanHook on one BatchNorm2d in eval mode
adversarial  the two lines of CMISynthesizer.synthesize that make ``loss_adv``
contrastive  its lines from ``cached_feature`` to ``loss_cr``, with MLPHead and MemoryBank
truncated    utils.save_image_batch on single-precision values, the PNG read back
synthesis    two calls of CMISynthesizer.synthesize, its ``reset_model`` replaced by closed-form
             weights and ``torch.randn`` by a wave; the crops that kornia drew were written down;
             totals are what ``backward`` was called on
storing      three steps of KiOP_BF.train with model_Fusion, fed waves as images
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import TinyNet, fill_with_waves, wave
from torch import Tensor, nn

from kiop_fast import reference, store, synthesize
from kiop_fast.config import SynthesisConfig
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.engine import engine
from kiop_fast.kernels import bn_match, border_index, mapped_kl
from kiop_fast.prompt import Prompt, PromptedModel, frequency_mapping
from kiop_fast.reference.hooks import InstanceMeanHook, StatisticsHook
from kiop_fast.runtime.draws import ViewDraws
from kiop_fast.source import Source, freeze

VALUES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "upstream_values.json").read_text()
)
ROOMS = pytest.mark.parametrize("room", ["fast", "reference"])
NORMALISER = {"mean": (0.5, 0.4, 0.45), "std": (0.25, 0.3, 0.2)}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours: Tensor | float, theirs: Any, tol: float = 1e-11) -> None:
    """Equal to ``tol`` of the largest expected magnitude (values are stored with 13 digits)."""
    expected = torch.as_tensor(theirs)
    size = float(expected.abs().max())
    torch.testing.assert_close(torch.as_tensor(ours), expected, rtol=0, atol=tol * size)


def wave_source(name: str, classes: int) -> Source:
    model = TinyNet(classes)
    fill_with_waves(model)
    labels = tuple(map(str, range(classes)))
    return freeze(model, DatasetInfo(name, 8, 3, labels, **NORMALISER), name=name, arch="tiny")


def wave_prompt(side: int, rings: tuple[int, ...]) -> Prompt:
    """Cells cut out of upstream's square programs, which are waves of pace 0.7, 1.7, …"""
    prompt = Prompt(side, rings)
    with torch.no_grad():
        for k, (inner, outer) in enumerate(zip((side, *rings), rings, strict=False)):
            square = wave(3, outer, outer, pace=0.7 + k).flatten(1)
            prompt.cells[k].copy_(square[:, border_index(inner, outer)])
    return prompt


@ROOMS
def test_prompt_forward_and_gradient(room: str) -> None:
    """Odd differences 3 and 1 and an even one: the odd pixel goes to the left and the top."""
    expected, rings = VALUES["prompt"], (8, 12, 13)
    prompt, images = wave_prompt(5, rings), wave(2, 3, 5, 5, pace=0.9)
    through: Callable[..., Tensor] = prompt
    if room == "reference":
        through = lambda x, depth: reference.pad_through(prompt, x, depth)  # noqa: E731
    for depth in (1, 2, 3):
        close(through(images, depth)[0], expected["depths"][depth - 1])
    seen = through(images, 3)
    (seen * wave(*seen.shape, pace=0.41)).sum().backward()
    for inner, outer, cells, program in zip(
        (5, *rings), rings, prompt.cells, expected["program_grads"], strict=False
    ):
        square = torch.tensor(program).flatten(1)
        close(cells.grad, square[:, border_index(inner, outer)].tolist())
        inside = torch.ones(outer * outer, dtype=torch.bool)
        inside[border_index(inner, outer)] = False
        assert not square[:, inside].any()  # what upstream stores there never matters


@pytest.mark.parametrize("make", [synthesize.Generator, reference.Generator])
def test_generator(make: Callable[..., nn.Module]) -> None:
    count = sum(p.numel() for p in make(256, 64, 32, 3).parameters())
    assert count == VALUES["generator"]["parameters_256_64_32_3"]
    # Linear 256 → 128·8², BatchNorm 128, conv 128 → 128, BatchNorm, conv → 64, BatchNorm, conv → 3
    by_hand = (257 * 8192) + 256 + (128 * 128 * 9 + 256) + (128 * 64 * 9 + 128) + (64 * 3 * 9 + 3)
    assert count == by_hand
    small = make(5, 2, 8, 3).train()
    fill_with_waves(small)
    close(small(wave(3, 5, pace=1.3)), VALUES["generator"]["images"])


@ROOMS
@pytest.mark.parametrize("expected", VALUES["kl"], ids=["T=1", "T=20"])
def test_kl_and_its_gradients(room: str, expected: dict[str, Any]) -> None:
    """Both sides: A's term trains through the target's, the provider's through the other."""
    logits = (3 * wave(4, 6, pace=1.1)).requires_grad_()
    targets = (3 * wave(4, 6, pace=1.7)).requires_grad_()
    temperature = expected["T"]
    if room == "fast":
        loss = mapped_kl(logits, targets, None, temperature).loss
    else:
        loss = reference.kl(logits, targets, temperature)
    loss.backward()
    close(loss, expected["loss"])
    close(logits.grad, expected["logits_grad"])
    close(targets.grad, expected["targets_grad"])
    log_q, log_p = (logits / temperature).log_softmax(1), (targets / temperature).log_softmax(1)
    formula = temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / 4
    close(loss, formula.item())
    close(logits.grad, (temperature / 4 * (log_q.exp() - log_p.exp())).tolist())


@ROOMS
def test_batchnorm_loss_and_features(room: str) -> None:
    expected = VALUES["batchnorm"]
    layer = nn.BatchNorm2d(3).eval()
    fill_with_waves(layer)
    x = wave(4, 3, 5, 5, pace=0.77).requires_grad_()
    if room == "fast":
        assert layer.running_mean is not None
        assert layer.running_var is not None
        match = bn_match(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
        )
        loss, means = match.loss, match.image_means
        close(match.output, layer(x).tolist())
    else:
        statistics, instance = StatisticsHook(layer), InstanceMeanHook(layer)
        layer(x)
        loss, means = statistics.loss, instance.means
    loss.backward()
    close(loss, expected["loss"])
    close(means, expected["means"])
    close(x.grad, expected["grad"])


@ROOMS
def test_adversarial_loss(room: str) -> None:
    expected = VALUES["adversarial"]
    assert 0 < expected["agree"] < 6  # some rows count, some do not
    student = (2 * wave(6, 7, pace=0.5)).requires_grad_()
    teacher = (2 * wave(6, 5, pace=0.8)).requires_grad_()
    room_ = reference if room == "reference" else synthesize.losses
    loss = room_.adversarial_loss(student, teacher, torch.tensor(expected["mapping"]))
    loss.backward()
    close(loss, expected["loss"])
    close(student.grad, expected["student_grad"])
    close(teacher.grad, expected["teacher_grad"])


@ROOMS
@pytest.mark.parametrize("expected", VALUES["contrastive"], ids=["empty bank", "cached rows"])
def test_contrastive_loss(room: str, expected: dict[str, Any]) -> None:
    cached = expected["cached"]
    head: Any = synthesize.ProjectionHead(5, 0, 3) if room == "fast" else reference.Head(5, 0, 3)
    fill_with_waves(head, 1.0)
    local, global_ = wave(3, 5, pace=1.9).requires_grad_(), wave(3, 5, pace=0.6).requires_grad_()
    rows = wave(cached, 10, pace=0.37)
    room_ = reference if room == "reference" else synthesize.losses
    if room == "fast":  # takes rows with room for the batch
        rows = torch.cat([wave(3, 10), rows])
    loss = room_.contrastive_loss(head, local, global_, rows[:, :5], rows[:, 5:], 0.6)
    loss.backward()
    close(loss, expected["loss"])
    close(local.grad, expected["local_grad"])
    assert expected["global_grad_is_none"]
    assert global_.grad is None or not global_.grad.any()
    for parameter, theirs in zip(head.parameters(), expected["head_grads"], strict=True):
        close(parameter.grad, theirs)


@ROOMS
def test_truncation_is_a_png_round_trip(room: str) -> None:
    values = torch.cat([torch.arange(256) / 255.0, wave(512, pace=0.013, lift=0.5)]).float()
    quantise = reference.quantise if room == "reference" else synthesize.quantise
    ours = quantise(values.view(3, 16, 16))
    assert ours.tolist() == VALUES["truncated"]
    assert ours.min() == 0
    assert ours.max() == 255  # the wave leaves [0, 1] on both sides


@ROOMS
def test_two_whole_synthesize_calls(room: str) -> None:
    """Losses of all steps, the best step's images and features, the head; then with a bank."""
    expected = VALUES["synthesis"]
    steps, batch = expected["steps"], expected["batch"]
    teacher, target = wave_source("teacher", 5), wave_source("target", 7)
    parts = engine(room)
    config = SynthesisConfig(
        batch=batch, steps=steps, lr=0.05, latent=5, width=2, head_dim=3, adv=0.5, cr=0.8
    )
    system = parts.synthesizer(
        teacher, config, teacher.info, side=8, bank_rows=8, seed=0, task="t",
        device=torch.device("cpu"),
    )  # fmt: skip
    fill_with_waves(system.head, 1.0)
    generator = synthesize.Generator(5, 2, 8, 3)
    fill_with_waves(generator)
    weights = {name: p.detach().clone() for name, p in generator.named_parameters()}
    # The wave also fills BatchNorm's running statistics, which train mode never reads.
    student = parts.prompted(target, wave_prompt(8, (11,)), 1, batchnorm="batch")
    mapping = torch.tensor(expected["mapping"])
    for k, call in enumerate(expected["calls"]):
        crop, box = torch.tensor(call["crop"]), torch.tensor(call["box"])
        seen = ViewDraws(
            crop[..., :2], torch.tensor(call["crop_flip"]), box, torch.tensor(call["box_flip"])
        )
        drawn = synthesize.SynthesisDraws(
            weights, wave(batch, 5, pace=1.3 + k), torch.tensor(call["targets"]), seen, None
        )
        result = system.synthesize(drawn, student.logits, mapping)
        close(result.losses[:, -1], call["totals"], 1e-9)
        assert result.best_step == min(range(steps), key=call["totals"].__getitem__)
        assert result.images.tolist() == call["images"]
        close(result.features, call["features"], 1e-9)
        close(system.features.rows[k * batch : (k + 1) * batch], call["features"], 1e-9)
        for parameter, theirs in zip(system.head.parameters(), call["head"], strict=True):
            close(parameter, theirs, 1e-9)


@ROOMS
def test_three_storing_steps(room: str) -> None:
    """Both terms' losses and the cells after SGD with momentum and weight decay."""
    expected = VALUES["storing"]
    target, provider = wave_source("target", 7), wave_source("provider", 5)
    prompt, mapping = wave_prompt(8, (11, 16)), torch.tensor(expected["mapping"])
    kind = PromptedModel if room == "fast" else reference.ReferencePromptedModel
    losses = store if room == "fast" else reference
    core = losses.core_loss(kind(target, prompt, 1), 20.0, "prompted")
    outer = losses.provider_loss(kind(target, prompt, 2, mapping), provider, 20.0, "provider")
    optimizer = torch.optim.SGD(prompt.parameters(), 2.0, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        theirs = expected["losses"][2 * step : 2 * step + 2]
        b = outer(wave(4, 3, 8, 8, pace=0.31 * (step + 1))).loss
        a = core(wave(4, 3, 8, 8, pace=0.53 * (step + 1))).loss
        assert abs(b.item() - theirs[0]) < 1e-12
        assert abs(a.item() - theirs[1]) < 1e-12  # a small difference of logarithms, times 400
        optimizer.zero_grad()
        (a + b).backward()
        optimizer.step()
    for inner, ring, cells, program in zip(
        (8, 11), (11, 16), prompt.cells, expected["programs"], strict=True
    ):
        square = torch.tensor(program).flatten(1)
        close(cells.detach(), square[:, border_index(inner, ring)].tolist(), 1e-10)


def test_frequency_mapping_by_hand() -> None:
    """Upstream has only the random mapping; the greedy one is worked out by hand (SPEC 3).

    Ties go to the lowest s, then the lowest t; a class without images takes the lowest free s.
    """
    table = torch.tensor([
        [3, 0, 8, 0, 7],
        [9, 6, 9, 0, 9],
        [0, 0, 2, 0, 0],
        [7, 0, 8, 0, 7],
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ])  # fmt: skip
    # Row 1 holds 9 for t = 0, 2 and 4: the tie goes to the lowest t, which takes row 1 from 2.
    # Then 8 at (0, 2) before (3, 2); then 7 at (3, 4).  Class 1 occurs only in row 1: zeros are
    # left, the lowest open s is 2.  Class 3 never occurs: s = 4.
    assert frequency_mapping(table).tolist() == [1, 2, 0, 4, 3]
    table[1] = torch.tensor([0, 6, 9, 0, 0])
    # 9 at (1, 2); then 7 at (0, 4), the lowest s of three; 7 at (3, 0).
    assert frequency_mapping(table).tolist() == [3, 2, 1, 4, 0]
