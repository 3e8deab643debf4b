"""Run one of the authors' scripts, untouched, on a machine without CUDA; a program of its own.

    python beside_upstream.py CHECKOUT SCRIPT.py plain|patched DRAWS.pt RESULT.json -- FLAGS
    python beside_upstream.py CHECKOUT command DRAWS.pt RESULT.json -- FLAGS
    python beside_upstream.py CHECKOUT evaluate CHECKPOINT.pth RESULT.json [TIMES]

The second runs ``kiop-fast upstream KiOP_BF`` on the draws of a plain run; the third loads a .pth
into the script's own model and asks the script's own evaluators, TIMES times with torch seeds 0,
1, … (a VGG's dropout stays on there) and once more with dropout taken out.

Adapted from outside only: ``termcolor`` and ``lmdb``, where they are missing, are empty modules;
torchvision's constructors are asked for no ImageNet weights (the scripts overwrite them; the same
random numbers are drawn); ``--gpu`` is the CPU and ``Tensor.cuda`` does nothing.

How draws are fed: a ``plain`` run writes its own to DRAWS.pt (beside_draws.py says which); a
``patched`` run hands them to ``accelerate_upstream(draw=…, order=…)``.  With ``-`` for DRAWS.pt
every run draws its own.  BESIDE_DOUBLE=1 computes in double precision, where rounding does not
grow into the images.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from beside_draws import Feeder, Recorder, drawn_call

warnings.filterwarnings("ignore")


def adapt(checkout: Path) -> None:
    """Make the checkout importable and runnable without CUDA."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(checkout))
    for name in ("termcolor", "lmdb"):
        try:
            importlib.import_module(name)
        except ImportError:
            stub = types.ModuleType(name)
            stub.colored = lambda text, *a, **k: text  # type: ignore[attr-defined]
            sys.modules[name] = stub
    import torchvision.models as models

    for name in ("resnet18", "resnet50", "resnet101"):
        real = getattr(models, name)
        setattr(models, name, lambda weights=None, real=real: real(weights=None))
    vgg = models.vgg13_bn
    models.vgg13_bn = lambda pretrained=False: vgg(weights=None, init_weights=False)
    torch.Tensor.cuda = lambda self, *a, **k: self


def command(draws: str, result: str, flags: list[str]) -> None:
    """Our command on a plain run's draws: B's synthesizer was made first, then A's."""
    import kiop_fast.run as run_module
    from kiop_fast.dropin.command import Job, run_upstream
    from kiop_fast.store import StoringDraws

    if os.environ.get("BESIDE_DOUBLE"):
        torch.set_default_dtype(torch.float64)
    recorded = torch.load(draws, weights_only=True)
    totals: list[list[list[float]]] = [[], []]
    steps: list[float] = []
    places: dict[str, int] = {}

    def draw_synthesis(config: Any, source: Any, side: int, **named: Any) -> Any:
        return drawn_call(recorded[places[named["task"]]]["calls"][named["epoch"]], config, side)

    def draw_storing(config: Any, info: Any, population: int, batch: int, **named: Any) -> Any:
        order = recorded[places[named["task"]]]["calls"][named["epoch"]]["order"]
        index = torch.tensor(order[: config.steps * batch]).view(config.steps, batch)
        return StoringDraws(index, 0, None, None)

    prepare, on_epoch = Job.prepare, Job.on_epoch

    def fed(self: Any, run: Any) -> None:
        prepare(self, run)
        for task in run.tasks:
            place = places[task.name] = int(task.source is run.sources.target)
            with torch.no_grad():
                heads = zip(
                    task.synthesizer.head.parameters(), recorded[place]["head"], strict=True
                )
                for ours, theirs in heads:
                    ours.copy_(theirs)
            real = task.synthesizer.synthesize

            def synthesize(*given: Any, real: Any = real, place: int = place, **named: Any) -> Any:
                found = real(*given, **named)
                totals[place].append(found.losses[:, -1].tolist())
                return found

            task.synthesizer.synthesize = synthesize

    def noted(self: Any, run: Any, metrics: Any, timings: Any) -> None:
        for a, b in run.log[:, :2].tolist():  # the script asks B's term first
            steps.extend([b, a])
        on_epoch(self, run, metrics, timings)

    run_module.draw_synthesis, run_module.draw_storing = draw_synthesis, draw_storing
    Job.prepare, Job.on_epoch = fed, noted
    run_upstream("KiOP_BF", flags)
    Path(result).write_text(json.dumps({"totals": totals, "kl": steps}))


def evaluate(checkout: str, pth: str, result: str, times: str = "1") -> None:
    """Accuracies of a .pth in KiOP_BF's model and evaluators: B's task and A's, a row a seed."""
    from functools import partial

    import numpy as np

    adapt(Path(checkout).resolve())
    import datafree
    import KiOP_BF
    import registry
    from visual_prompt import ExpansiveVisualPrompt

    torch.set_num_threads(1)
    saved = torch.load(pth)  # torch's default: nothing is unpickled but plain values
    state, own = saved["state_dict"], saved["kiop_fast"]
    inner, outer = (state[f"{m}.program"].shape[-1] for m in ("modelA", "modelD"))
    student = KiOP_BF.model_Fusion(
        ExpansiveVisualPrompt(inner, mask=np.zeros((32, 32))), backbone_of(state),
        partial(KiOP_BF.label_mapping_base, mapping_sequence=own["mappings"][0]),
        ExpansiveVisualPrompt(outer, mask=np.zeros((inner, inner))),
    )  # fmt: skip
    student.load_state_dict(state)
    student.eval()
    found = []
    for name in (own["datasets"][1], own["datasets"][0]):
        data = registry.get_dataset(name, data_root="data")[2]
        found.append(torch.utils.data.DataLoader(data, batch_size=16, shuffle=False))

    def both(seed: int) -> dict[str, list[float]]:
        torch.manual_seed(seed)
        b = datafree.evaluators.classification_evaluator(found[0])(student, device="cpu")
        a = datafree.evaluators.classification_prompt_evaluator_v2(found[1])(
            student.modelA, student.modelB, device="cpu"
        )
        return {n: [*e["Acc"], float(e["Loss"])] for n, e in (("B", b), ("A", a))}

    rows = [both(seed) for seed in range(int(times))]
    drops = [m for m in student.modelB.modules() if isinstance(m, torch.nn.Dropout)]
    for layer in drops:
        layer.p = 0.0
    Path(result).write_text(json.dumps({
        "rows": rows, "still": both(0) if drops else rows[0],
        "mappings": [mapping.tolist() for mapping in own["mappings"]],
    }))  # fmt: skip


def backbone_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The torchvision model whose weights are ``modelB.*``, classifier replaced as they do it."""
    from torchvision import models

    if "modelB.fc.bias" in state:
        model = models.resnet18()
        model.fc = torch.nn.Linear(model.fc.in_features, len(state["modelB.fc.bias"]))
        return model
    model = models.vgg13_bn()
    last = model.classifier[6]
    model.classifier[6] = torch.nn.Linear(last.in_features, len(state["modelB.classifier.6.bias"]))
    return model


def main() -> None:
    if sys.argv[2] == "evaluate":
        evaluate(sys.argv[1], *sys.argv[3:])
        return
    if sys.argv[2] == "command":
        torch.set_num_threads(1)
        command(*sys.argv[3:5], sys.argv[6:])
        return
    checkout, script, mode, draws, result, _, *flags = sys.argv[1:]
    adapt(Path(checkout).resolve())
    torch.set_num_threads(1)
    import datafree

    fed, recorder, count = draws != "-", None, None
    feeder = Feeder(draws if mode == "patched" else "-")
    if mode == "patched":
        from kiop_fast import accelerate_upstream

        feed = {"draw": feeder.draw, "order": feeder.order} if fed else {}
        count = accelerate_upstream(**feed)
        kind = datafree.synthesis.CMISynthesizer
        after: list[Any] = []
        real = kind.synthesize

        def synthesize(self: Any, targets: Any = None) -> Any:
            found = real(self, targets)
            place = feeder.place(self)
            while len(after) <= place:
                after.append([])
            after[place].append(self.losses[:, -1].tolist())
            return found

        kind.synthesize = synthesize
    elif fed:
        recorder = Recorder(datafree, draws=True)
    steps: list[float] = []
    criterion = datafree.criterions.KLDiv
    forward = criterion.forward

    def noted(self: Any, logits: Any, targets: Any) -> Any:
        value = forward(self, logits, targets)
        if self.reduction == "batchmean":
            steps.append(float(value))
        return value

    criterion.forward = noted
    sys.argv = [script, *flags]
    module = importlib.import_module(Path(script).stem)
    module.parser.set_defaults(gpu=torch.device("cpu"))
    random.seed(0)
    mappings: list[Any] = []
    real_partial = module.partial

    def partial(*given: Any, **named: Any) -> Any:
        if "mapping_sequence" in named:
            mappings.append(named["mapping_sequence"].tolist())
        return real_partial(*given, **named)

    module.partial = partial
    if os.environ.get("BESIDE_DOUBLE"):
        torch.set_default_dtype(torch.float64)
    began = time.perf_counter()
    module.main()
    seconds = time.perf_counter() - began
    if recorder is not None:
        torch.save(recorder.draws(), draws)
    Path(result).write_text(json.dumps({
        "seconds": seconds, "kl": steps, "mappings": mappings, "counts": count and dict(count),
        "totals": recorder.totals() if recorder else after if mode == "patched" else [],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
