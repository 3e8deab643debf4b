"""The draws of the authors' script: recorded in a plain run, fed to a run of ours.

A plain run draws everything itself.  Recorded are initial head weights, and for every call of
``synthesize`` z, targets, the reset generator, kornia's crops, boxes and flips, and the order in
which images were asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch


class Recorder:
    """Writes down what a plain run draws and loses."""

    def __init__(self, datafree: Any, draws: bool) -> None:
        self.made: dict[int, dict[str, Any]] = {}  # by synthesizer, in the order of their making
        self.keep = draws
        module = importlib.import_module("datafree.synthesis.contrastive")
        self._wrap_synthesize(module)
        if draws:
            self._wrap_loader(datafree, module)

    def of(self, synthesizer: Any) -> dict[str, Any]:
        return self.made.setdefault(
            id(synthesizer), {"calls": [], "totals": [], "head": None, "self": synthesizer}
        )

    def _wrap_synthesize(self, module: Any) -> None:
        kind, recorder = module.CMISynthesizer, self
        real = kind.synthesize

        def synthesize(self: Any, targets: Any = None) -> Any:
            mine, call = (
                recorder.of(self),
                {k: [] for k in ("crop", "crop_flip", "box", "box_flip")},
            )
            if mine["head"] is None:
                mine["head"] = [p.detach().clone() for p in self.head.parameters()]
                self.aug = recorder.views(self, self.aug)
            call |= {"order": [], "totals": []}
            mine["calls"].append(call)
            randn, backward, reset = torch.randn, torch.Tensor.backward, module.reset_model

            def noted(*a: Any, **k: Any) -> Any:
                value = randn(*a, **k)
                if tuple(value.shape) == (self.synthesis_batch_size, self.nz):
                    call["z"] = value.clone()
                return value

            def back(loss: Any, *a: Any, **k: Any) -> Any:
                call["totals"].append(float(loss))
                return backward(loss, *a, **k)

            def new(model: Any) -> None:
                reset(model)
                call["weights"] = [p.detach().clone() for p in model.parameters()]

            torch.randn, torch.Tensor.backward, module.reset_model = noted, back, new
            try:
                result = real(self, targets)
            finally:
                torch.randn, torch.Tensor.backward, module.reset_model = randn, backward, reset
            call["targets"] = result[2].clone()
            return result

        kind.synthesize = synthesize

    def views(self, synthesizer: Any, aug: Any) -> Any:
        def recording(x: Any) -> Any:
            views, call = aug(x), self.of(synthesizer)["calls"][-1]
            for name, transform in zip(("crop", "box"), aug.transform, strict=True):
                place, flip = transform.transforms[:2]
                corners = place._params["src"].long()  # x, y, clockwise from the top left
                left, top = corners[:, 0, 0], corners[:, 0, 1]
                width, height = corners[:, 1, 0] - left + 1, corners[:, 3, 1] - top + 1
                box = torch.stack([top, left, height, width], dim=1)
                call[name].append(box[:, :2] if name == "crop" else box)
                call[f"{name}_flip"].append(flip._params["batch_prob"] > 0.5)
            return views

        return recording

    def _wrap_loader(self, datafree: Any, module: Any) -> None:
        """One process reads the pool, so that the order of its images can be seen."""
        loader, pictures = torch.utils.data.DataLoader, datafree.utils.UnlabeledImageDataset
        read, recorder = pictures.__getitem__, self

        def single(*given: Any, **named: Any) -> Any:
            return loader(*given, **{**named, "num_workers": 0})

        def getitem(self: Any, index: int) -> Any:
            folder, name = Path(self.images[index]).parent, Path(self.images[index]).stem
            for mine in recorder.made.values():
                if Path(mine["self"].data_pool.root) == folder:
                    call, row = map(int, name.split("-"))
                    batch = mine["self"].synthesis_batch_size
                    mine["calls"][-1]["order"].append(call * batch + row)
            return read(self, index)

        torch.utils.data.DataLoader, pictures.__getitem__ = single, getitem

    def draws(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in mine.items() if k != "self"} for mine in self.made.values()]

    def totals(self) -> list[list[list[float]]]:
        return [[call["totals"] for call in mine["calls"]] for mine in self.made.values()]


class Feeder:
    """Hands a plain run's draws to the accelerated synthesizers, in the order of their making."""

    def __init__(self, file: str) -> None:
        self.recorded = torch.load(file, weights_only=True) if file != "-" else None
        self.seen: dict[int, int] = {}
        self.made: list[Any] = []
        self.calls: dict[int, int] = {}
        self.losses: list[list[list[float]]] = []
        self.asked: dict[tuple[int, int], int] = {}

    def place(self, synthesizer: Any) -> int:
        if id(synthesizer) not in self.seen:
            self.seen[id(synthesizer)] = len(self.made)
            self.made.append(synthesizer)
        return self.seen[id(synthesizer)]

    def draw(self, synthesizer: Any, targets: Any) -> Any:
        place = self.place(synthesizer)
        number = self.calls.get(place, 0)
        self.calls[place] = number + 1
        mine = self.recorded[place]
        call = mine["calls"][number]
        if number == 0:
            with torch.no_grad():
                for ours, theirs in zip(synthesizer.head.parameters(), mine["head"], strict=True):
                    ours.copy_(theirs)
        return drawn_call(call, synthesizer._period.config, synthesizer.img_size[1])

    def order(self, synthesizer: Any, count: int) -> Any:
        place = self.place(synthesizer)
        number = self.calls[place] - 1
        turn = self.asked.get((place, number), 0)
        self.asked[place, number] = turn + 1
        told = self.recorded[place]["calls"][number]["order"][turn * count : (turn + 1) * count]
        rest = [i for i in range(count) if i not in set(told)]
        return torch.tensor(told + rest)


def drawn_call(call: dict[str, Any], config: Any, side: int) -> Any:
    """The recorded draws of one call as ours."""
    from kiop_fast.runtime.draws import ViewDraws
    from kiop_fast.synthesize import Generator, SynthesisDraws

    with torch.device("meta"):
        like = Generator(config.latent, config.width, side, 3)
    names = [name for name, _ in like.named_parameters()]
    weights = dict(zip(names, call["weights"], strict=True))
    seen = ViewDraws(*(torch.stack(call[k]) for k in ("crop", "crop_flip", "box", "box_flip")))
    return SynthesisDraws(weights, call["z"], call["targets"], seen, None)
