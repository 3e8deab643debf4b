"""The authors' public code, unmodified, on the same problem: ``--upstream PATH``.

``PATH`` is a checkout the user made; nothing of it is in this repository.  Its own classes and
functions do the work: ``CMISynthesizer.synthesize`` and ``KiOP_BF.train``.
What is changed is changed from outside and only this: modules it imports but a step does not use
(``registry``, ``termcolor``) are empty, the working folder is a temporary one, and the loader's
processes start when the first batch is asked for, so that they count in the prompt step as the
reference's do.  For the check alone, weights, latents, targets and crops are ours; timed calls draw
their own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import engines
import gates
import numpy as np
import torch
from sizes import Problem
from torch import Tensor
from world import MEAN, SEED, STD, World, feature_rows, smooth_images

from kiop_fast.kernels import border_index
from kiop_fast.reference.views import global_view, local_view, normalise
from kiop_fast.synthesize import draw_synthesis
from kiop_fast.synthesize.generator import load_weights

STAND_INS = ("registry", "termcolor")


class Unavailable(Exception):
    """Why the authors' code cannot run here."""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Upstream writes beside the working folder; what it prints is dropped."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.chdir(before)


def load(path: Path) -> types.SimpleNamespace:
    """Upstream's modules.

    Raises:
        Unavailable: no such checkout, or a package it imports is missing.
    """
    if not (path / "KiOP_BF.py").exists():
        raise Unavailable(f"{path} is no checkout of the authors' code (no KiOP_BF.py)")
    for name in STAND_INS:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["termcolor"].__dict__.setdefault("colored", lambda text, *a, **k: text)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        names = {"main": "KiOP_BF", "prompt": "visual_prompt", "datafree": "datafree",
                 "contrastive": "datafree.synthesis.contrastive",
                 "generator": "datafree.models.generator",
                 "losses": "datafree.criterions"}  # fmt: skip
        return types.SimpleNamespace(
            **{key: importlib.import_module(name) for key, name in names.items()}
        )
    except ImportError as error:
        raise Unavailable(f"the authors' code does not import here: {error}") from None
    finally:
        sys.dont_write_bytecode = before


class Late:
    """A loader whose processes start when the first batch is asked for."""

    def __init__(self, make: Callable[[Any], Any], loader: Any) -> None:
        self.make, self.loader, self.batches = make, loader, None

    def next(self) -> Any:
        self.batches = self.batches or self.make(self.loader)
        return self.batches.next()


class Upstream:
    """The problem in the authors' hands.

    Args:
        modules: from :func:`load`.
        problem: one provider; BatchNorm policy of training.
        device: where.
        folder: scratch for its PNG files.
    """

    def __init__(
        self, modules: types.SimpleNamespace, problem: Problem, device: torch.device, folder: Path
    ) -> None:
        self.modules, self.problem, self.device, self.folder = modules, problem, device, folder
        config = problem.config
        # The very weights of a world; its prompt is flat, as upstream's starts.
        short = problem.with_(
            bank=config.storing.batch, synthesis={"steps": gates.STEPS},
            storing={"steps": gates.STEPS},
        )  # fmt: skip
        self.world = World(short, engines.make("reference"), device, folder / "world")
        target, provider = self.world.target.model, self.world.jobs["B"].source.model
        mapping = self.world.jobs["B"].mapping
        inner, outer = config.prompt.rings
        make_prompt, main = modules.prompt.ExpansiveVisualPrompt, modules.main
        with working_in(folder):
            core = make_prompt(inner, mask=np.zeros((config.side, config.side))).to(device)
            periphery = make_prompt(outer, mask=np.zeros((inner, inner))).to(device)
            worn = _trainable(target).train()
            relabel = partial(main.label_mapping_base, mapping_sequence=mapping)
            self.student = main.model_Fusion(core, worn, relabel, periphery)
            self.core = main.model_Fusion_1(core, worn)
            self.teachers = {"B": _trainable(provider), "A": _trainable(target)}
            self.generator = modules.generator.Generator(
                nz=config.synthesis.latent, ngf=config.synthesis.width, img_size=config.side, nc=3
            )
            self.systems = {
                name: self._system(name, student)
                for name, student in (("B", self.student), ("A", self.core))
            }
        storing = config.storing
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), storing.lr, weight_decay=storing.weight_decay,
            momentum=storing.momentum,
        )  # fmt: skip

    def _system(self, name: str, student: Any) -> Any:
        config, synthesis = self.problem.config, self.problem.config.synthesis
        from torchvision import transforms as T

        classes = self.problem.classes[0 if name == "A" else 1]
        system = self.modules.contrastive.CMISynthesizer(
            self.teachers[name], student, self.generator, nz=synthesis.latent,
            num_classes=classes, img_size=(3, config.side, config.side), cn=3,
            bank_size=max(4096, 64 * synthesis.batch, self._capacity()), n_neg=synthesis.negatives,
            head_dim=synthesis.head_dim, iterations=synthesis.steps, lr_g=synthesis.lr,
            synthesis_batch_size=synthesis.batch, sample_batch_size=config.storing.batch,
            adv=synthesis.adv, bn=synthesis.bn, oh=synthesis.oh, cr=synthesis.cr,
            cr_T=synthesis.cr_temperature, save_dir=f"pool{name}",
            transform=T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)]),
            normalizer=self.modules.datafree.utils.Normalizer(mean=MEAN, std=STD),
            device=self.device,
        )  # fmt: skip
        if self.problem.cached:
            system.mem_bank.data[: self.problem.cached] = feature_rows(
                self.problem.cached, system.mem_bank.dim_feat // 2
            )
        return system

    def _capacity(self) -> int:
        """Rows of its bank: a multiple of the batch above what is cached (it asserts that)."""
        batch = self.problem.config.synthesis.batch
        return (self.problem.cached // batch + 8) * batch

    def rewind(self, name: str) -> None:
        """The bank holds ``problem.cached`` rows again."""
        bank = self.systems[name].mem_bank
        bank._ptr = bank.n_updates = self.problem.cached

    @contextmanager
    def _late(self) -> Iterator[None]:
        contrastive = self.modules.contrastive
        late = partial(Late, contrastive.DataIter)
        with working_in(self.folder), mock.patch.object(contrastive, "DataIter", late):
            yield

    def synthesize(self, name: str) -> dict[str, Any]:
        """One call of the authors' method; it draws for itself."""
        with self._late():
            images, _, _ = self.systems[name].synthesize()
        found: dict[str, Any] = images
        return found

    def check_synthesis(self, name: str, tolerance: float) -> None:
        """Given our weights, latents, targets and crops, its method finds the reference's features.

        Raises:
            AssertionError: it does not.
        """
        system, job, config = self.systems[name], self.world.jobs[name], self.world.problem.config
        drawn = draw_synthesis(
            config.synthesis, job.source, config.side, seed=SEED, epoch=0, task=name, call=0,
            stored=self.problem.cached,
        )  # fmt: skip
        _copy_in_order(job.system.head, system.head)
        self.rewind(name)
        steps = iter(range(config.synthesis.steps))

        def views(images: Tensor) -> tuple[Tensor, Tensor]:
            step, seen = next(steps), drawn.views
            wide = global_view(images, seen.crop[step], seen.crop_flip[step], config.synthesis.pad)
            near = local_view(images, seen.box[step], seen.box_flip[step])
            return normalise(wide, MEAN, STD), normalise(near, MEAN, STD)

        def start(generator: Any) -> None:
            own = copy.deepcopy(job.system.generator)
            load_weights(own, drawn.weights)
            _copy_in_order(own, generator)

        latent = drawn.z.to(self.device, copy=True)
        with (
            self._late(),
            mock.patch.object(self.modules.contrastive, "reset_model", start),
            mock.patch.object(system, "aug", views),
            mock.patch.object(system, "iterations", config.synthesis.steps),
            mock.patch.object(torch, "randn", return_value=latent),
        ):
            system.synthesize(targets=drawn.targets)
        expected = self.world.synthesizing(name)().features
        first = self.problem.cached
        features = system.mem_bank.data[first : first + len(expected)]
        gates.check_equal("upstream's features", features, expected, tolerance)
        self.rewind(name)

    def check_store(self, tolerance: float) -> None:
        """Two steps on pools of one batch move its prompt as the reference's is moved.

        A batch is then a permutation of the pool, on which no loss depends.

        Raises:
            AssertionError: they do not.
        """
        self.fill(self.world.problem)
        self.store(gates.STEPS)
        self.world.store()
        config = self.problem.config
        sides = (config.side, *config.prompt.rings)
        for k, program in enumerate((self.student.modelA.program, self.student.modelD.program)):
            border = border_index(sides[k], sides[k + 1]).to(self.device)
            cells = self.world.prompt.cells[k]
            gates.check_equal("upstream's prompt", program.flatten(1)[:, border], cells, tolerance)

    def fill(self, problem: Problem) -> None:
        """New pools hold the images of every engine's banks, behind loaders like its own."""
        images = smooth_images(problem.bank, problem.config.side)
        utilities, batch = self.modules.datafree.utils, problem.config.storing.batch
        for name, system in self.systems.items():
            with working_in(self.folder):
                pool = utilities.ImagePool(f"pool{name}-{problem.bank}")
                # Half a level up, so that truncation gives the same bytes.
                pool.add((images.float() + 0.5).clamp(max=255) / 255, 3)
                pictures = pool.get_dataset(transform=system.transform)
            loader = torch.utils.data.DataLoader(
                pictures, batch_size=batch, shuffle=True, num_workers=4, pin_memory=True
            )
            system.data_iter = Late(utilities.DataIter, loader)

    def store(self, steps: int) -> None:
        """The authors' training loop."""
        storing = self.problem.config.storing
        gpu = self.device.index or 0 if self.device.type == "cuda" else None
        arguments = types.SimpleNamespace(
            kd_steps=steps, gpu=gpu, autocast=contextlib.nullcontext, fp16=False, print_freq=0
        )
        loss = self.modules.losses.KLDiv(T=storing.temperature)
        models = [self.student, self.teachers["B"], self.teachers["A"]]
        with working_in(self.folder):
            self.modules.main.train(
                self.systems["B"], self.systems["A"], models, "cifar10", "cifar100", None, None,
                loss, self.optimizer, arguments,
            )  # fmt: skip

    def restart_loaders(self) -> None:
        """Loader processes start anew in the next period, as they do every epoch."""
        for system in self.systems.values():
            system.data_iter.batches = None


def _trainable(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose weights take gradients, as upstream's do."""
    return copy.deepcopy(model).requires_grad_(True)


def _copy_in_order(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Parameters one after another: the modules are the same, their names are not."""
    ours, theirs = list(source.parameters()), list(target.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
