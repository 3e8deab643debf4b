"""Checkpoints of the scripts into prompt files and back, without losing a bit."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kiop_fast.data import dataset
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.dropin.checkpoint import (
    FORMAT,
    OWN,
    RING_NAMES,
    UpstreamCheckpoint,
    fusion_state,
    mask,
    optimizer_states,
    read_checkpoint,
    square,
    write_checkpoint,
)
from kiop_fast.dropin.measure import measure
from kiop_fast.dropin.remainder import read_remainder, write_remainder
from kiop_fast.dropin.replay import replay_mappings
from kiop_fast.errors import ArtefactError, MappingError
from kiop_fast.prompt import Prompt, PromptedModel
from kiop_fast.prompt.artefact import Artefact, load_prompt, save_prompt
from kiop_fast.prompt.served import ArtefactTarget, ArtefactTask
from kiop_fast.runtime.versions import versions
from kiop_fast.source import Source

TOLERANCE = 1.0  # points between recorded and measured accuracy; what fp order may move
TOLERANCE_DROPOUT = 5.0  # where the scripts leave A's dropout on while they measure


@dataclass(frozen=True)
class Replay:
    """How the script was started, so that its mapping can be drawn again."""

    script: str
    seed: int
    backbone_t: str = "ResNet18"
    backbone_s: str = "ResNet18"
    backbone_l: str = "ResNet18"


def remainder_path(prompt: Path) -> Path:
    """Where what a prompt file cannot hold is kept: beside it."""
    return prompt.with_suffix(".upstream.safetensors")


def import_upstream(
    checkpoint: Path, out: Path, target: Source, providers: Sequence[str], *,
    mappings: Sequence[Tensor] | None = None, replay: Replay | None = None, verify: bool = True,
    batch: int = 64,
) -> Artefact:  # fmt: skip
    """Make a prompt file of a ``.pth``.

    The label mapping comes from the file if we wrote it, else from ``mappings``, else from
    ``replay``, and is then verified: the accuracy of B's task must be the recorded one.  What a
    prompt file does not hold (fp32 values, optimiser, drifted statistics) goes beside it, so
    that :func:`export_upstream` gives back every value of the ``.pth``.

    Args:
        out: the prompt file.
        target: model A.
        providers: names of the providers' datasets.
        batch: images a pass while verifying; the scripts' ``--batch_size``.

    Raises:
        ArtefactError: no such checkpoint, or another model A.
        MappingError: no mapping, or one that does not give the recorded accuracy.
    """
    found = read_checkpoint(checkpoint)
    check_model(found, target)
    infos = [dataset(name).info for name in providers]
    kept = found.own.get("prompt")
    if kept is not None:
        artefact = _kept_prompt(found, kept)
    else:
        chosen, drawn = choose_mappings(found, target, infos, mappings, replay)
        if drawn and verify:
            check_accuracy(found, target, infos[0], chosen[0], batch)
        artefact = make_artefact(found, target, infos, chosen)
    save_prompt(out, artefact)
    write_remainder(remainder_path(out), found.content, target.model.state_dict())
    return artefact


def check_model(found: UpstreamCheckpoint, target: Source) -> None:
    """Raise ArtefactError unless A's parameters are those in the checkpoint."""
    for name, parameter in target.model.named_parameters():
        theirs = found.model.get(name)
        if theirs is None or not torch.equal(theirs, parameter.detach().cpu()):
            raise ArtefactError(
                "the checkpoint was made with another model A", got=f"{name} differs",
                expected="the weights that its modelB.* holds", fix="give A's own weights",
            )  # fmt: skip


def choose_mappings(
    found: UpstreamCheckpoint, target: Source, infos: Sequence[DatasetInfo],
    given: Sequence[Tensor] | None, replay: Replay | None,
) -> tuple[list[Tensor], bool]:  # fmt: skip
    """The mappings, and whether they were drawn again and need verifying."""
    counts = [len(info.classes) for info in infos]
    chosen, drawn = found.mappings or given, False
    if chosen is None and replay is not None:
        keys = ("dataset", "son_dataset")
        classes = {"real_dataset": target.classes, **dict(zip(keys, counts, strict=False))}
        chosen, drawn = replay_mappings(replay.script, Namespace(**vars(replay)), classes), True
    if chosen is None:
        raise MappingError(
            "the scripts do not save the label mapping", got="none in the checkpoint",
            expected="one class of A for each class of a provider",
            fix="give --mapping 4,0,6,… or a file of numbers, or --script and --seed to draw it "
            "again as the script did",
        )  # fmt: skip
    sizes = [len(mapping) for mapping in chosen]
    if sizes != counts:
        raise MappingError("the mappings do not fit the providers", got=f"{sizes} entries",
                           expected=f"{counts} ({', '.join(i.name for i in infos)})",
                           fix="give one --mapping a --provider, in their order")  # fmt: skip
    return [mapping.long() for mapping in chosen], drawn


def check_accuracy(
    found: UpstreamCheckpoint, target: Source, info: DatasetInfo, mapping: Tensor, batch: int
) -> None:
    """Raise MappingError unless B's task has the accuracy that the checkpoint records."""
    device = next(target.model.parameters()).device
    prompt = Prompt(found.side, found.rings).to(device)
    with torch.no_grad():
        for cells, values in zip(prompt.cells, found.cells, strict=True):
            cells.copy_(values)
    depth = min(2, len(found.rings))
    seen = PromptedModel(target, prompt, depth, mapping.to(device), batchnorm="batch")
    provider = Source(info.name, "", target.model, info, "")
    accuracy = measure(seen, provider, found.side, batch, device)["top1"]
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in target.model.modules())
    tolerance = TOLERANCE_DROPOUT if drops else TOLERANCE
    if abs(accuracy - found.best) > tolerance:
        raise MappingError(
            "the mapping drawn again is not the one the prompt was trained with",
            got=f"{info.name}: {accuracy:.2f} % with torch {torch.__version__}",
            expected=f"{found.best:.2f} %, as recorded in the checkpoint",
            fix="check --seed, the backbones and --batch-size; draws can differ between torch "
            "versions: use the script's, or give --mapping",
        )  # fmt: skip


def make_artefact(
    found: UpstreamCheckpoint, target: Source, infos: Sequence[DatasetInfo],
    mappings: Sequence[Tensor],
) -> Artefact:  # fmt: skip
    """A prompt file's content: A's task at ring 1, each provider's further out; policy batch."""
    tasks = [ArtefactTask(target.info.name, 1, None, None, target.info)]
    names = {target.info.name}
    for i, (info, mapping) in enumerate(zip(infos, mappings, strict=True)):
        name = info.name if info.name not in names else f"{info.name}-{i + 2}"
        names.add(name)
        tasks.append(ArtefactTask(name, min(i + 2, len(found.rings)), mapping, None, info))
    return Artefact(
        side=found.side, rings=found.rings, cells=found.cells, tasks=tuple(tasks),
        target=ArtefactTarget(target.arch, target.name, target.sha256, target.info),
        batchnorm="batch", versions=versions(),
        metrics={"epoch": found.epoch, "accuracy": {tasks[1].name: found.best / 100}},
    )  # fmt: skip


def _kept_prompt(found: UpstreamCheckpoint, kept: Tensor) -> Artefact:
    """The prompt file that was exported, if the squares still hold its cells."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        path.write_bytes(bytes(kept.tolist()))
        artefact = load_prompt(path)
    same = [torch.equal(a.half(), b) for a, b in zip(found.cells, artefact.cells, strict=True)]
    if not all(same):
        raise ArtefactError("the checkpoint was changed after it was exported",
                            got="other values in modelA.program or modelD.program",
                            expected="those of the prompt file inside it",
                            fix="export the prompt again")  # fmt: skip
    return artefact


def export_upstream(prompt: Path, out: Path, target: Source) -> dict[str, Any]:
    """Make a ``.pth`` for the scripts of a prompt file; its entries.

    A prompt that came from a ``.pth`` gives that one back, value by value.

    Raises:
        ArtefactError: the prompt has a shape that the scripts do not know.
    """
    artefact = load_prompt(prompt)
    artefact.on(target)  # the right model A?
    state = target.model.state_dict()
    beside = remainder_path(prompt)
    content: dict[str, Any]
    if beside.exists():
        content = read_remainder(beside, state)
        _check_remainder(artefact, content, beside)
    else:
        content = entries(artefact, prompt, target, state)
    write_checkpoint(out, content)
    return content


def _check_remainder(artefact: Artefact, content: Mapping[str, Any], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "x.pth", content)
        found = read_checkpoint(Path(folder) / "x.pth")
    equal = [torch.equal(a.half(), b) for a, b in zip(found.cells, artefact.cells, strict=False)]
    if found.rings != artefact.rings or not all(equal):
        raise ArtefactError(f"{path.name} belongs to another prompt", got=path,
                            expected="what was imported together with this prompt",
                            fix="delete it, to export the prompt alone")  # fmt: skip


def entries(
    artefact: Artefact, path: Path, target: Source, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Entries of a ``.pth`` for a prompt that did not come from one."""
    others = [task for task in artefact.tasks if task.mapping is not None]
    rings, side = artefact.rings, artefact.side
    depths = [min(i + 2, len(rings)) for i in range(len(others))]
    if len(rings) > 3 or not others or [task.depth for task in others] != depths:
        raise ArtefactError(
            "the scripts know no prompt of this shape",
            got=f"rings {list(rings)}, depths {[task.depth for task in artefact.tasks]}",
            expected="one ring for all, or ring 1 for A and one more a provider; at most three",
            fix="serve it with kiop_fast",
        )  # fmt: skip
    cells = [ring.float() for ring in artefact.cells]
    settings = artefact.config.get("storing", {})
    epoch = int(artefact.metrics.get("epoch", 0))
    count = len(rings) + len(list(target.model.parameters()))
    optimizer, schedule = optimizer_states(
        settings.get("lr", 0.8), settings.get("weight_decay", 1e-4),
        artefact.config.get("epochs", max(epoch, 1)), epoch, count, [],
    )  # fmt: skip
    accuracy = artefact.metrics.get("accuracy", {}).get(others[0].name, 0.0)
    own: dict[str, Any] = {
        "format": FORMAT, "mappings": [task.mapping for task in others],
        "datasets": [target.info.name, *(task.info.name for task in others)],
        "prompt": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8),
    }  # fmt: skip
    if len(rings) == 3:
        own["state_dict_son"] = {f"{RING_NAMES[2]}.program": square(cells[2], rings[1], rings[2]),
                                 f"{RING_NAMES[2]}.mask": mask(rings[1], rings[2])}  # fmt: skip
    return {
        "epoch": epoch, "arch": target.name, "best_acc1": 100.0 * accuracy,
        "state_dict": fusion_state(side, rings, cells, state), "optimizer": optimizer,
        "scheduler": schedule, OWN: own,
    }  # fmt: skip


def parse_mapping(text: str) -> Tensor:
    """``4,0,6`` or a file of numbers separated by commas or blanks; int64.

    Raises:
        MappingError: anything else.
    """
    content = Path(text).read_text() if Path(text).is_file() else text
    try:
        return torch.tensor([int(part) for part in content.replace(",", " ").split()])
    except ValueError:
        raise MappingError("a mapping is a list of A's classes", got=content[:80],
                           expected="4,0,6,… or a file of such numbers") from None  # fmt: skip
