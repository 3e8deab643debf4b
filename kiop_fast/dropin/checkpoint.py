"""The scripts' ``.pth``: the same entries, keys and shapes, from ring cells and back.

``state_dict`` is that of the scripts' ``model_Fusion``: ``modelA.program`` and ``modelA.mask``
(ring 1 as a full square, 1 where its cells are), ``modelD.*`` (ring 2), ``modelB.*`` (model A
itself).  Ring 3 of three models, which the scripts leave out, and the mappings are kept under a
key of our own, ``kiop_fast``, which their loader does not look at.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kiop_fast.errors import ArtefactError
from kiop_fast.kernels import border_index
from kiop_fast.runtime.files import atomic_write

RING_NAMES = ("modelA", "modelD", "modelE")
OWN = "kiop_fast"  # the entry of a .pth that only we read
FORMAT = 1


@dataclass(frozen=True, eq=False)
class UpstreamCheckpoint:
    """What a ``.pth`` of the scripts says.

    Attributes:
        side: image side, pixels.
        rings: canvas side after each ring, pixels.
        cells: (3, n_k) fp32 a ring.
        momentum: SGD's buffers in the same shapes; None where there is none yet.
        model: state dict of model A as it was saved (its running statistics have drifted).
        mappings: of the providers; None for a checkpoint of the scripts themselves.
        epoch: epochs done.
        best: best accuracy of B's task so far, percent.
        own: the rest of our entry.
        content: everything, as loaded.
    """

    side: int
    rings: tuple[int, ...]
    cells: list[Tensor]
    momentum: list[Tensor] | None
    model: dict[str, Tensor]
    mappings: list[Tensor] | None
    epoch: int
    best: float
    own: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def square(cells: Tensor, inner: int, outer: int) -> Tensor:
    """Ring cells (C, S² - s²) in their places on a square (C, S, S), 0 elsewhere."""
    full = cells.detach().float().cpu().new_zeros(cells.shape[0], outer * outer)
    full[:, border_index(inner, outer)] = cells.detach().float().cpu()
    return full.view(-1, outer, outer)


def mask(inner: int, outer: int) -> Tensor:
    """(3, S, S): 1 on the border, 0 where the inner canvas goes."""
    count = outer * outer - inner * inner
    return square(torch.ones(3, count), inner, outer)


def fusion_state(
    side: int, rings: Sequence[int], cells: Sequence[Tensor], model: Mapping[str, Tensor], *,
    identity_ring: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """State dict of the scripts' ``model_Fusion`` (of ``model_Fusion_core`` for one ring).

    Args:
        side: image side, pixels.
        rings: at most the first two go in.
        cells: (3, n_k) a ring.
        model: A's state dict.
        identity_ring: one ring, but ``modelD`` is there and does nothing (KiOP_BF with
            ``--vp1_size`` equal to ``--vp2_size``).
    """
    state: dict[str, Tensor] = {}
    for name, (inner, outer), ring in zip(
        RING_NAMES[:2], pairwise([side, *rings]), cells, strict=False
    ):
        state[f"{name}.program"] = square(ring, inner, outer)
        state[f"{name}.mask"] = mask(inner, outer)
    if identity_ring:
        outer = rings[0]
        state["modelD.program"] = torch.zeros(3, outer, outer)
        state["modelD.mask"] = torch.zeros(3, outer, outer)
    return {**state, **{f"modelB.{key}": value.detach().cpu() for key, value in model.items()}}


def optimizer_states(
    lr: float, weight_decay: float, epochs: int, done: int, parameters: int,
    buffers: Sequence[Tensor],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """State dicts of SGD and its cosine schedule after ``done`` epochs, as the scripts save them.

    Args:
        parameters: of prompt and model together, all listed, frozen or not.
        buffers: momentum of the first parameters, in the shapes of the state dict.
    """
    optimizer = torch.optim.SGD(
        [nn.Parameter(torch.zeros(1))], lr, weight_decay=weight_decay, momentum=0.9
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    optimizer.step()
    for _ in range(done):
        schedule.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"] = list(range(parameters))
    saved["state"] = {i: {"momentum_buffer": buffer} for i, buffer in enumerate(buffers)}
    return saved, schedule.state_dict()


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """``torch.save``, atomically."""
    data = io.BytesIO()
    torch.save(dict(content), data)
    atomic_write(path, data.getvalue())


def read_checkpoint(path: Path) -> UpstreamCheckpoint:
    """Read a ``.pth`` of the scripts or of ours; nothing in it is executed.

    Raises:
        ArtefactError: no such file, or no checkpoint of the scripts.
    """
    content = _load(path)
    state = content.get("state_dict")
    if not isinstance(state, Mapping) or "modelA.program" not in state:
        keys = list(state)[:5] if isinstance(state, Mapping) else list(content)[:5]
        raise _not_theirs(path, f"entries {keys}")
    own = content.get(OWN) or {}
    state = {**state, **own.get("state_dict_son", {})}
    side, sizes, cells, places = _rings(path, state)
    model = {k[len("modelB.") :]: v for k, v in state.items() if k.startswith("modelB.")}
    if not model:
        raise _not_theirs(path, "no modelB.*")
    return UpstreamCheckpoint(
        side, tuple(sizes), cells, _momentum(content, places), model, own.get("mappings"),
        int(content.get("epoch", 0)), float(content.get("best_acc1", 0.0)), own, content,
    )  # fmt: skip


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ArtefactError("no such checkpoint", got=path, expected="a .pth that a script wrote",
                            fix="check the path, e.g. checkpoints/datafree-cmi/…")  # fmt: skip
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _not_theirs(path, first[:200]) from None
    if not isinstance(content, Mapping):
        raise _not_theirs(path, f"a {type(content).__name__}")
    return content


def _not_theirs(path: Path, got: str) -> ArtefactError:
    return ArtefactError(
        f"{path.name} is no checkpoint of the scripts", got=got,
        expected="a dict with state_dict: modelA.program, modelA.mask, …, modelB.*",
        fix="give the .pth below checkpoints/datafree-METHOD/",
    )  # fmt: skip


def _rings(
    path: Path, state: Mapping[str, Tensor]
) -> tuple[int, list[int], list[Tensor], list[tuple[int, int]]]:
    """Image side, ring sides, cells and (inner, outer) of each ring that has cells."""
    sizes: list[int] = []
    cells: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for name in RING_NAMES:
        if f"{name}.program" not in state:
            break
        program, border = state[f"{name}.program"], state[f"{name}.mask"]
        outer = program.shape[-1]
        inner = round(float((border[0] == 0).sum()) ** 0.5)
        if program.shape != border.shape or not torch.equal(mask(inner, outer), border):
            raise _not_theirs(path, f"{name}.mask of {tuple(border.shape)} is no square ring")
        if inner < outer:
            places.append((inner, outer))
            sizes.append(outer)
            cells.append(program.flatten(1)[:, border_index(inner, outer)].clone())
    if not sizes or any(a[1] != b[0] for a, b in pairwise(places)):
        raise _not_theirs(path, f"rings {places} do not nest")
    return places[0][0], sizes, cells, places


def _momentum(content: Mapping[str, Any], places: list[tuple[int, int]]) -> list[Tensor] | None:
    state = (content.get("optimizer") or {}).get("state") or {}
    found = []
    for i, (inner, outer) in enumerate(places):
        buffer = (state.get(i) or {}).get("momentum_buffer")
        if buffer is None or buffer.shape[-1] != outer:
            return None
        found.append(buffer.flatten(1)[:, border_index(inner, outer)].clone())
    return found
