"""Accuracy on test data.  The only place that reads test splits; nothing here reaches training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.config import BATCHNORM_POLICIES, LoadingConfig, PromptConfig
from kiop_fast.config_io import from_dict
from kiop_fast.data import FileSplit, Loader, data_folder, dataset, known, open_loader
from kiop_fast.data.spec import Dataset, DatasetInfo, Split
from kiop_fast.errors import DataError
from kiop_fast.prompt import Prompt, PromptedModel, bank_logits, bank_mapping, calibrate
from kiop_fast.prompt.artefact import Artefact, ArtefactTask
from kiop_fast.prompt.served import PromptedTask
from kiop_fast.runtime.execution import PLAIN
from kiop_fast.source import Source

Classifier = Callable[[Tensor], Tensor]
_RULES = ("frequency", "likelihood")  # of mappings, data-free


@lru_cache(maxsize=16)
def _read(data: Dataset, side: int, folder: Path) -> Split | FileSplit:
    """``folder`` is where downloaded datasets lie now: another one, other images."""
    return data.test(side)


def has_test_data(info: DatasetInfo) -> bool:
    """Whether a dataset goes by that name; a model from a hub may bring none along."""
    return info.name in known() or info.name.startswith("folder:")


def read_test(info: DatasetInfo, side: int) -> Split | FileSplit:
    """The test split of ``info``'s data, uint8, cached by dataset and side.

    Raises:
        DataError: no dataset of that name.
    """
    return _read(dataset(info.name), side, data_folder())


def require_test_data(info: DatasetInfo, side: int) -> None:
    """Before long work: read what the first evaluation will need; nothing is returned.

    Raises:
        DataError: test data that go by a known name are not there or damaged.
    """
    if not has_test_data(info):
        return
    try:
        read_test(info, side)
    except DataError as error:
        error.args = (f"{error}\n  or:       evaluation.every=0 trains without test data",)
        raise


@lru_cache(maxsize=16)
def _loader(
    split: Split | FileSplit, info: DatasetInfo, batch: int, device: torch.device,
    loading: LoadingConfig, dtype: torch.dtype,
) -> Loader:  # fmt: skip
    """A loader of a test split, opened once: [0, 1], in order, the last batch kept."""
    return open_loader(split, info, batch=batch, training=False, normalise=False, device=device,
                       loading=loading)  # fmt: skip


def _test_batches(
    info: DatasetInfo, side: int, batch: int, device: torch.device, loading: LoadingConfig | None
) -> Loader:
    loading = loading or LoadingConfig()
    split = read_test(info, side)
    return _loader(split, info, batch, device, loading, torch.get_default_dtype())


@torch.no_grad()
def task_accuracy(
    classify: Classifier,
    info: DatasetInfo,
    side: int,
    batch: int = 256,
    device: torch.device | str = "cpu",
    loading: LoadingConfig | None = None,
) -> float:
    """Share of test images whose arg-max is their label; on a GPU, too, nothing less than fp32.

    Args:
        classify: images (N, C, side, side) in [0, 1] → logits (N, classes).
        info: names the data.
        side: image side, pixels.
        batch: images a pass; under policy ``batch`` the result depends on it.
        device: where ``classify`` computes.
        loading: who makes the batches.
    """
    device = torch.device(device)
    loader = _test_batches(info, side, batch, device, loading)
    right = torch.zeros((), dtype=torch.int64, device=device)
    with PLAIN.products(device):
        for images, labels in loader.epoch():
            right += (classify(images).argmax(dim=1) == labels).sum()
    return int(right) / loader.size


def source_accuracy(
    source: Source, side: int, batch: int = 256, loading: LoadingConfig | None = None
) -> float:
    """Accuracy of a source model on its own test data, at image side ``side``."""

    def classify(images: Tensor) -> Tensor:
        logits: Tensor = source.model(source.normalise(images))
        return logits

    return task_accuracy(classify, source.info, side, batch, _device(source.model), loading)


def evaluate(
    artefact: Artefact,
    target: Source,
    providers: Mapping[str, Source],
    *,
    batch: int = 256,
    banks: Mapping[str, Tensor] | None = None,
    loading: LoadingConfig | None = None,
) -> dict[str, Any]:
    """Everything a table about a prompt shows, JSON-able.

    Args:
        artefact: the prompt.
        target: model A.
        providers: by task name; without its provider a task has no ceiling and no floor.
        batch: images a pass.
        banks: synthetic images (M, C, s, s) uint8 by task name, for the floors.
        loading: who makes the batches of test images.

    Returns:
        ``batchnorm``: the artefact's policy.  ``tasks``: for each task that has data ``accuracy``;
        ``ceiling``, the source's own accuracy; ``floor``, the untrained prompt with the better, on
        these test images, of the mappings that two data-free rules make of the bank; ``oracle``,
        the trained prompt with the best of its own mapping and those that the rules make of
        *test* labels, which no data-free method may use; ``images``; unknown values are None.
        ``policies``: accuracies by BatchNorm policy and task, those the artefact can be served
        under.
    """
    served = artefact.on(target)
    tasks: dict[str, dict[str, Any]] = {}
    for task in (task for task in artefact.tasks if has_test_data(task.info)):
        source = target if task.mapping is None else providers.get(task.name)
        module = served.task(task.name)
        logits, labels = _test_logits(module, batch, loading)
        tasks[task.name] = {
            "accuracy": _share(_mapped(logits, task.mapping), labels),
            "ceiling": None
            if source is None
            else source_accuracy(source, artefact.side, batch, loading),
            "floor": _floor(
                artefact, target, task, source, (banks or {}).get(task.name), batch, loading
            ),
            "oracle": _oracle_accuracy(logits, labels, task),
            "images": len(labels),
        }
    policies = {artefact.batchnorm: {name: facts["accuracy"] for name, facts in tasks.items()}}
    for policy in BATCHNORM_POLICIES:
        able = policy != "calibrated" or all(task.statistics for task in artefact.tasks)
        if policy not in policies and able:
            policies[policy] = _accuracies(artefact, target, policy, batch, loading)
    return {"batchnorm": artefact.batchnorm, "batch": batch, "tasks": tasks, "policies": policies}


def _accuracies(
    artefact: Artefact, target: Source, policy: str, batch: int, loading: LoadingConfig | None
) -> dict[str, float]:
    served = artefact.on(target, check=False, batchnorm=policy)
    return {
        task.name: task_accuracy(
            served.task(task.name), task.info, artefact.side, batch, _device(target.model), loading
        )
        for task in artefact.tasks
        if has_test_data(task.info)
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _test_logits(
    module: PromptedTask, batch: int, loading: LoadingConfig | None
) -> tuple[Tensor, Tensor]:
    """A's unmapped logits and the labels of a task's whole test split, on A's device."""
    loader = _test_batches(module.info, module.side, batch, _device(module), loading)
    with PLAIN.products(_device(module)):
        parts = [(module.target_logits(images), labels) for images, labels in loader.epoch()]
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)


def _mapped(logits: Tensor, mapping: Tensor | None) -> Tensor:
    return logits if mapping is None else logits[:, mapping.to(logits.device)]


def _share(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(dim=1) == labels).sum()) / len(labels)


def _oracle_accuracy(logits: Tensor, labels: Tensor, task: ArtefactTask) -> float | None:
    """With the best mapping that test labels choose; never used elsewhere."""
    if task.mapping is None:
        return None
    classes = torch.arange(len(task.info.classes), device=labels.device)
    sure = torch.where(labels[:, None] == classes, 0.0, -torch.inf)
    made = [bank_mapping(rule, logits, sure, task.mapping) for rule in _RULES]
    return max(_share(_mapped(logits, mapping), labels) for mapping in (task.mapping, *made))


def _floor(
    artefact: Artefact, target: Source, task: ArtefactTask, source: Source | None,
    bank: Tensor | None, batch: int, loading: LoadingConfig | None,
) -> float | None:  # fmt: skip
    needs_bank = artefact.batchnorm == "calibrated" or task.mapping is not None
    if source is None or (needs_bank and bank is None):
        return None
    found = untrained(artefact, target, task, source, bank)  # they differ in mappings alone
    module = found[0].on(target, check=False).task(task.name)
    logits, labels = _test_logits(module, batch, loading)
    return max(_share(_mapped(logits, bare.tasks[0].mapping), labels) for bare in found)


@torch.no_grad()
def untrained(
    artefact: Artefact, target: Source, task: ArtefactTask, source: Source, bank: Tensor | None
) -> list[Artefact]:
    """The same artefact before training: zero cells, what it needs made of the bank.

    Statistics (policy ``calibrated``) are estimated on ``bank`` (M, C, s, s) uint8 seen through
    the zero prompt; under them every data-free rule makes a mapping, so there are several such
    artefacts where ``task`` has a mapping, and one where it has none.
    """
    cells = [torch.zeros_like(ring) for ring in artefact.cells]
    device = _device(target.model)
    if bank is None:
        return [replace(artefact, cells=cells, tasks=(task,))]
    settings = from_dict(PromptConfig, artefact.config.get("prompt", {}))
    chunk, most = settings.calibration_batch, settings.calibration_images
    images = bank[:: -(-len(bank) // most)].to(device, torch.get_default_dtype()) / 255
    if artefact.batchnorm == "calibrated":
        prompt = Prompt(artefact.side, artefact.rings).to(device)
        seen = PromptedModel(target, prompt, task.depth)
        if task.info.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        task = replace(task, statistics=calibrate(seen, source.normalise(images), chunk))
    bare = replace(artefact, cells=cells, tasks=(task,))
    if task.mapping is None:
        return [bare]
    module = bare.on(target, check=False).task(task.name)
    said = bank_logits(
        module.target_logits, lambda part: source.model(source.normalise(part)), images, chunk
    )
    temperature = artefact.config.get("storing", {}).get("temperature", 1.0)
    made = [bank_mapping(rule, *said, None, temperature) for rule in _RULES]
    return [replace(bare, tasks=(replace(task, mapping=mapping),)) for mapping in made]


def forget_test_data() -> None:
    """Read test splits anew when they are asked for next: the data folder has changed."""
    _read.cache_clear()
