"""Library use: the documentation's example, any module, device and state left alone, callbacks."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import TinyNet, fill_with_waves
from torch import Tensor, nn

import kiop_fast
from kiop_fast import Callback, KiOP
from kiop_fast.data.spec import DatasetInfo
from kiop_fast.errors import ConfigError, KiopError, SourceError
from kiop_fast.library import LogCallback

DOCS = Path(__file__).parent.parent / "docs"
SMALL: dict[str, Any] = {
    "side": 8, "epochs": 2, "threads": 1, "prompt": {"rings": [11, 16], "calibration_batch": 8},
    "synthesis": {"batch": 8, "steps": 2, "width": 4, "latent": 8, "head_width": 8, "pad": 1},
    "storing": {"steps": 3, "batch": 4, "lr": 1.0, "temperature": 4.0},
}  # fmt: skip


SEVEN = DatasetInfo("seven", 8, 3, tuple("abcdefg"))


def waves(classes: int) -> nn.Module:
    net = TinyNet(classes)
    fill_with_waves(net)
    return net


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(), re.DOTALL)
    root = Path(kiop_fast.__file__).parent.parent
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**__import__("os").environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    # 3 (20² - 16²) + 3 (32² - 20²) cells of two bytes
    assert said.stdout.splitlines()[-1] == "torch.Size([5, 10]) 4608 bytes of prompt"
    assert len([line for line in said.stdout.splitlines() if line.startswith("epoch 2")]) >= 3
    assert (tmp_path / "prompt.safetensors").exists()


class Attention(nn.Module):
    """No ResNet at all: patches, attention and a BatchNorm in between."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        return self.out(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_any_module_is_taken_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    target, provider = Attention(7), waves(5)
    target.train()
    target.out.weight.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in (target, provider)]
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in (target, provider)]
    strides = [p.stride() for p in target.parameters()]
    prompt = KiOP(target, {"job": provider}, **SMALL).fit()
    for model, was, (training, grads), k in zip(
        (target, provider), before, flags, (0, 1), strict=True
    ):
        assert model.training is training, k
        assert [p.requires_grad for p in model.parameters()] == grads
        assert all(torch.equal(was[name], value) for name, value in model.state_dict().items())
    assert [p.stride() for p in target.parameters()] == strides
    assert [task.name for task in prompt.tasks] == ["target", "job"]
    logits = prompt.on(target).task("job")(torch.rand(3, 3, 8, 8))
    assert logits.shape == (3, 5)
    assert logits.isfinite().all()


class Listen(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.epochs: list[int] = []
        self.prompts: list[Any] = []

    def on_step(self, stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        self.steps.append((stage, done, total))
        assert set(losses) == {"loss"}

    def on_epoch(self, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        self.epochs.append(metrics["epoch"])
        assert timings["seconds"] > 0

    def on_end(self, prompt: Any) -> None:
        self.prompts.append(prompt)


def test_callbacks_hear_every_stage(caplog: pytest.LogCaptureFixture) -> None:
    listen = Listen()
    with caplog.at_level("INFO", logger="kiop_fast"):
        kiop = KiOP(waves(7), {"job": waves(5)}, callbacks=[listen, LogCallback()], **SMALL)
        prompt = kiop.fit()
    assert listen.epochs == [1, 2]
    assert listen.prompts == [prompt]
    stages = {stage for stage, done, total in listen.steps if done == total}
    one = {"synthesize target", "synthesize job", "store"}
    assert stages == {f"epoch {e}/2  {name}" for e in (1, 2) for name in one}
    assert [r.getMessage().split()[1] for r in caplog.records] == ["1", "2"]


def test_a_run_folder_is_kept_and_continued(tmp_path: Path) -> None:
    def kiop() -> KiOP:
        return KiOP(waves(7), {"job": waves(5)}, out=tmp_path / "run", seed=3, **SMALL)

    first = kiop().fit()
    again = kiop().fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(first.cells, again.cells, strict=True))
    with pytest.raises(KiopError, match="already holds a run"):
        kiop().fit()


def test_facts_decide_the_normaliser() -> None:
    info = DatasetInfo("mine", 8, 1, tuple("abcde"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    kiop = KiOP(waves(7), {"job": waves(5)}, data={"job": info}, **SMALL)
    provider = kiop.sources.providers[0]
    assert provider.info == DatasetInfo("job", 8, 1, tuple("abcde"), (0.5,) * 3, (0.2,) * 3)
    assert kiop.sources.target.info.classes == tuple("0123456")


def test_rounds_are_epochs_that_share_a_learning_rate(tmp_path: Path) -> None:
    """One epoch of two rounds makes the banks and draws of two epochs of one."""
    two = KiOP(
        waves(7), {"job": waves(5)}, out=tmp_path / "rounds", **{**SMALL, "epochs": 1}, rounds=2
    )
    plain = KiOP(waves(7), {"job": waves(5)}, out=tmp_path / "epochs", **SMALL)
    cells = [kiop.fit().cells for kiop in (two, plain)]
    from kiop_fast.deliver.run_data import read_banks

    banks = [read_banks(tmp_path / name)["job"] for name in ("rounds", "epochs")]
    assert torch.equal(banks[0].images[:8], banks[1].images[:8])
    assert [len(bank.images) for bank in banks] == [16, 16]
    # The second round learns at the full rate, the second epoch at half of it (cosine).
    assert not torch.equal(cells[0][0], cells[1][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_computes_where_the_target_lies() -> None:
    target = waves(7).cuda()
    prompt = KiOP(target, {"job": waves(5)}, **SMALL).fit()
    assert prompt.on(target).task("job")(torch.rand(2, 3, 8, 8).cuda()).is_cuda


def test_an_explicit_device_is_taken() -> None:
    kiop = KiOP(waves(7), {"job": waves(5)}, device="cpu", **SMALL)
    assert kiop.config.device == "cpu"
    split = waves(7)
    split.classify = split.classify.to("meta")
    with pytest.raises(SourceError, match="several devices"):
        KiOP(split, {"job": waves(5)}, **SMALL)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"target": nn.Conv2d(3, 4, 3)}, SourceError, "no classifier"),
        ({"target": nn.Flatten()}, SourceError, "no classifier of"),
        ({"target": nn.Linear(3, 3)}, SourceError, "does not accept images of 8"),
        ({"target": waves(7).half()}, SourceError, "single precision"),
        ({"providers": {}}, ConfigError, "one model or more"),
        ({"providers": {"target": waves(5)}}, ConfigError, "names other than"),
        ({"providers": {"us/job": waves(5)}}, ConfigError, "without /"),
        ({"providers": {"seven": waves(5)}, "data": {"target": SEVEN}}, ConfigError, "own task"),
        ({"data": {"jobs": "digits"}}, ConfigError, "not there"),
        ({"data": {"job": "digits"}}, SourceError, "5 outputs, 10 classes"),
        ({"mode": "vanilla"}, ConfigError, "learns no prompt"),
        ({"storing": {"rate": 1.0}}, ConfigError, "storing.rate"),
        ({"prompt": {"rings": [11, 16, 20]}}, ConfigError, "another number of rings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(change: dict[str, Any], error: type[KiopError], said: str) -> None:
    given = {"target": waves(7), "providers": {"job": waves(5)}, **SMALL, **change}
    with pytest.raises(error, match=said):
        KiOP(**given).fit()
