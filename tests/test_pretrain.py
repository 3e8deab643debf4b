"""Pretraining: the same weights from the same settings, no look at test data, a safe cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kiop_fast import pretrain as room
from kiop_fast.config import PretrainConfig
from kiop_fast.data import Dataset, DatasetInfo, Split, dataset, open_feed
from kiop_fast.errors import DataError, NonFiniteLossError, RunError, SourceError
from kiop_fast.pretrain import cached_source_path, ensure_source, pretrain, train_source
from kiop_fast.runtime import draws
from kiop_fast.source import build, fingerprint, freeze, load_source, parse_source
from kiop_fast.source.weights import read_weights

CPU = torch.device("cpu")
SIDE = 8


def stripes(count: int, name: str) -> Split:
    """Two classes, horizontal and vertical stripes with a little noise."""
    rng = draws.generator(0, 0, "stripes", name)
    images = rng.integers(0, 60, (count, 1, SIDE, SIDE))
    labels = rng.integers(0, 2, count)
    images[labels == 0, :, ::2, :] += 190
    images[labels == 1, :, :, ::2] += 190
    return Split(torch.from_numpy(images).to(torch.uint8), torch.from_numpy(labels))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A tiny built-in task called ``stripes`` with crops and flips, and its recipe."""
    info = DatasetInfo("stripes", SIDE, 1, ("rows", "columns"), pad=1, flip=0.5)
    made = Dataset(info, lambda side: stripes(96, "train"), lambda side: stripes(64, "test"))
    monkeypatch.setattr("kiop_fast.data.registry._DATASETS", {"stripes": made})
    monkeypatch.setattr(room, "BUILT_IN", ("stripes",))
    monkeypatch.setitem(room.RECIPES, "stripes", {"epochs": 2, "batch": 32})
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIOP_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TINY = PretrainConfig(arch="resnet8", data="stripes", side=SIDE, epochs=2, batch=32)
FULL = dataclasses.replace(TINY, noise=0.1, adversarial=0.5)


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """Bytes by tensor and the facts (safetensors does not keep the order of the latter)."""
    weights, facts = read_weights(path)
    return {key: value.numpy().tobytes() for key, value in weights.items()}, facts


@pytest.mark.parametrize("config", [TINY, FULL], ids=["plain", "noise and attack"])
def test_same_settings_same_model(task: Dataset, tmp_path: Path, config: PretrainConfig) -> None:
    torch.manual_seed(1)
    first = pretrain(config, tmp_path / "a.safetensors")
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = pretrain(config, tmp_path / "b.safetensors")
    assert contents(first) == contents(second)
    assert torch.equal(state, torch.random.get_rng_state())
    other = pretrain(dataclasses.replace(config, seed=1), tmp_path / "c.safetensors")
    assert contents(other)[0] != contents(first)[0]


def test_dropout_draws_from_the_training_alone(task: Dataset) -> None:
    def trained(seed: int) -> str:
        model = build("resnet8", 2, SIDE)
        model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        torch.manual_seed(seed)
        return train_source(TINY, task, model).sha256

    assert trained(1) == trained(2)


def test_it_learns_and_says_so(task: Dataset, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, **values: float) -> None:
        said.append((stage, done, total))
        assert set(values) == {"loss"}

    config = dataclasses.replace(TINY, epochs=6)
    path = pretrain(config, tmp_path / "m.safetensors", progress)
    source = load_source(parse_source(f"resnet8={path}"), sides=[SIDE], device=CPU)
    test = stripes(64, "test")
    right = source.model(source.normalise(test.images / 255)).argmax(1) == test.labels
    assert source.accuracy == right.float().mean().item() > 0.9
    assert said == [("pretrain resnet8@stripes", i + 1, 6) for i in range(6)]
    facts = read_weights(path)[1]
    assert facts["side"] == SIDE
    assert facts["extra"]["config"]["epochs"] == 6


def test_training_never_reads_the_test_split(task: Dataset) -> None:
    def poisoned(side: int) -> Split:
        raise AssertionError("the test split was read")

    blind = dataclasses.replace(task, test=poisoned)
    clean = train_source(FULL, task, build("resnet8", 2, SIDE))
    assert train_source(FULL, blind, build("resnet8", 2, SIDE)).sha256 == clean.sha256


def test_test_data_decide_nothing_but_the_accuracy(
    task: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(TINY, tmp_path / "a.safetensors")
    upside = dataclasses.replace(
        task, test=lambda side: Split(stripes(64, "test").images, 1 - stripes(64, "test").labels)
    )
    monkeypatch.setattr("kiop_fast.data.registry._DATASETS", {"stripes": upside})
    second = pretrain(TINY, tmp_path / "b.safetensors")
    (weights, facts), (others, other_facts) = read_weights(first), read_weights(second)
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    assert facts["accuracy"] == pytest.approx(1 - other_facts["accuracy"])


def test_every_image_is_seen_once_an_epoch(task: Dataset) -> None:
    """96 images in three batches of 32, neither augmented nor noised."""
    info = dataclasses.replace(task.info, pad=0, flip=0.0)
    train = stripes(96, "train")
    feed, labels = open_feed(train, info, batch=32, normalise=False)
    fed = room.Training(feed, labels)
    seen = torch.cat([x for x, _, _ in room._batches(TINY, info, fed, 0, 3)])
    assert seen.shape == (96, 3, SIDE, SIDE)
    mine = sorted((seen[:, 0] * 255).round().to(torch.uint8).flatten(1).tolist())
    assert mine == sorted(train.images.flatten(1).tolist())


def test_attack_follows_the_gradient_at_its_length(task: Dataset) -> None:
    """Against a linear model the direction is known: (softmax - onehot) through its weights."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))
    source = freeze(linear, task.info, name="x", arch="x")
    images = torch.full((3, 3, SIDE, SIDE), 0.5)
    labels, lengths = torch.tensor([0, 1, 0]), torch.tensor([0.0, 0.1, 0.3])
    moved = room._attacked(source, images, labels, lengths) - images
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx(lengths.tolist(), abs=1e-5)
    weight = linear[1].weight
    direction = F.normalize(weight[0] - weight[1], dim=0)  # raises the loss of class 1
    assert torch.allclose(moved[1].flatten(), 0.1 * direction, atol=1e-5)
    assert torch.allclose(moved[2].flatten(), -0.3 * direction, atol=1e-5)


def test_attack_lengths_grow_over_the_first_half(task: Dataset) -> None:
    config = dataclasses.replace(FULL, epochs=4)
    info = task.info
    train = room.Training(*open_feed(stripes(96, "train"), info, batch=32, normalise=False))
    longest = [
        torch.cat([lengths for _, _, lengths in room._batches(config, info, train, e, 3)])
        for e in range(4)
    ]
    assert longest[0][:32].max() == 0
    assert longest[0].max() <= 0.5 * 2 / 6 < longest[1].max() <= 0.5 * 5 / 6
    assert 0.45 < longest[3].max() <= 0.5


def test_batchnorm_settles_on_plain_images(task: Dataset) -> None:
    source = train_source(FULL, task, build("resnet8", 2, SIDE))
    images = stripes(96, "train").images.float() / 255
    first = F.conv2d(images.expand(-1, 3, -1, -1), source.model.conv.weight, padding=1)
    assert torch.allclose(source.model.bn.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(source.model.bn.running_var, first.var((0, 2, 3)), rtol=1e-4)
    assert source.model.bn.momentum == 0.1


def test_diverging_training_stops(task: Dataset) -> None:
    poisoned = build("resnet8", 2, SIDE)
    poisoned.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="epoch 1"):
        train_source(TINY, task, poisoned)


def test_unknown_data_and_architecture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean letters"):
        pretrain(PretrainConfig(data="leters"), tmp_path / "m")
    with pytest.raises(SourceError, match="did you mean"):
        pretrain(PretrainConfig(arch="resnet9"), tmp_path / "m")


# --- the cache ---------------------------------------------------------------------------------

SPEC = parse_source("resnet8@stripes")


def test_trained_once_then_reused(task: Dataset, cache: Path) -> None:
    path = ensure_source(SPEC, SIDE, device="cpu")
    stamp = path.stat().st_mtime_ns
    assert path.is_relative_to(cache)
    assert path == cached_source_path(SPEC, SIDE)
    assert ensure_source(SPEC, SIDE, device="auto").stat().st_mtime_ns == stamp
    source = load_source(SPEC, sides=[SIDE, 12], device=CPU)
    assert source.info == task.info
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_recipe_side_or_architecture_is_another_file(
    task: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {cached_source_path(SPEC, SIDE), cached_source_path(SPEC, 16)}
    paths.add(cached_source_path(dataclasses.replace(SPEC, name="resnet20"), SIDE))
    for recipe in ({"epochs": 3, "batch": 32}, {"epochs": 2, "batch": 32, "adversarial": 0.1}):
        monkeypatch.setitem(room.RECIPES, "stripes", recipe)
        paths.add(cached_source_path(SPEC, SIDE))
    monkeypatch.setattr(room, "REVISION", room.REVISION + 1)
    paths.add(cached_source_path(SPEC, SIDE))
    assert len(paths) == 6


def test_killed_while_writing_leaves_nothing_to_pick_up(
    task: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached_source_path(SPEC, SIDE)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ensure_source(SPEC, SIDE)
    assert not path.exists()
    (path.parent / f".{path.name}.half").write_bytes(b"half")  # as SIGKILL would leave it
    assert load_source(
        dataclasses.replace(SPEC, path=ensure_source(SPEC, SIDE)), sides=[SIDE], device=CPU
    )


def test_pretrain_without_a_path_goes_into_the_cache(task: Dataset, cache: Path) -> None:
    assert pretrain(TINY).parent == cache / "sources"


def test_specs_that_need_no_training(task: Dataset) -> None:
    assert ensure_source(parse_source("resnet8@stripes=x.pth"), SIDE) == Path("x.pth")
    assert ensure_source(parse_source("python:module:function@stripes"), SIDE) is None


@pytest.mark.parametrize("text", ["resnet18@cifar100", "resnet8", "resnet8@strips"])
def test_data_that_is_not_built_in(task: Dataset, text: str) -> None:
    with pytest.raises((SourceError, DataError), match=r"no weights|unknown dataset"):
        ensure_source(parse_source(text), SIDE)


def test_every_built_in_task_has_a_recipe() -> None:
    from kiop_fast.data import BUILT_IN

    for name in BUILT_IN:
        config = room.recipe(parse_source(f"resnet8@{name}"), 16)
        assert (config.data, config.side) == (name, 16)
        assert dataset(name).info.name == name


def test_fingerprint_in_the_header_is_that_of_the_model(task: Dataset, tmp_path: Path) -> None:
    path = pretrain(TINY, tmp_path / "m.safetensors")
    weights, facts = read_weights(path)
    model = build("resnet8", 2, SIDE)
    model.load_state_dict(weights)
    assert fingerprint(model) == facts["sha256"]


def test_where_no_file_can_be_written_nothing_is_trained(
    task: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "train_source", lambda *_: pytest.fail("trained"))
    with pytest.raises(RunError, match="cannot be written"):
        pretrain(PretrainConfig(data="stripes", side=SIDE), tmp_path)
