"""The scripts' command lines run: what they read, print and leave behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from typer.testing import CliRunner
from upstream_files import DIGITS, SIGNS, write_mnist, write_source
from upstream_runs import FLAGS, Tiny, always_best, go, lines, pth, tiny_folder

import kiop_fast
from kiop_fast.cli import app
from kiop_fast.deliver.run_data import read_run
from kiop_fast.dropin.command import run_upstream
from kiop_fast.dropin.replay import replay_mappings
from kiop_fast.errors import ArtefactError, ConfigError, DataError
from kiop_fast.kernels import border_index

EVAL = (r"Epoch=\d+ Acc@1=[\d.]+ Acc@5=[\d.]+ Loss=[\d.]+ Acc@1_tea=[\d.]+ Acc@5_tea=[\d.]+ "
        r"Loss_tea=[\d.]+ ")  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_folder(tmp_path, monkeypatch)


def test_a_whole_run_with_torchvisions_resnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ``python -m kiop_fast.upstream KiOP_BF.py``, as a shell script would call it."""
    from upstream_files import working_folder

    working_folder(tmp_path, 43, 43)
    given = [v.replace("Tiny", "ResNet18") for v in FLAGS]
    arguments = [*given, "--epochs", "1", "--log_tag", "kiop", "-p", "2", "--balance", "0.2"]
    root = Path(kiop_fast.__file__).parent.parent
    said = subprocess.run(
        [sys.executable, "-m", "kiop_fast.upstream", "KiOP_BF.py", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**__import__("os").environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    monkeypatch.chdir(tmp_path)
    logged = lines("mnist-mnist-gtsrb-kiop")
    head = r"\[\d\d/\d\d \d\d:\d\d:\d\d\] mnist-mnist-gtsrb INFO: "
    assert all(re.match(head, line) for line in logged)
    assert re.fullmatch(head + r"\[Eval\] " + EVAL + r"Lr=0\.8000", logged[-3])
    assert re.fullmatch(head + r"Best: [\d.]+", logged[-2])
    assert any(line.endswith("log_tag: -kiop") for line in logged)
    assert any("note: --balance has no effect" in line for line in logged)
    assert sum("[Train] Epoch=0 Iter=" in line for line in logged) == 2
    assert logged[-3].split("INFO: ")[1] in said.stdout
    state = pth()["state_dict"]
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    model = torchvision.models.resnet18(num_classes=SIGNS).state_dict()
    wanted = {"modelA.program": (3, 20, 20), "modelA.mask": (3, 20, 20),
              "modelD.program": (3, 28, 28), "modelD.mask": (3, 28, 28)}  # fmt: skip
    assert shapes == wanted | {f"modelB.{k}": tuple(v.shape) for k, v in model.items()}
    assert list(shapes)[:4] == list(wanted)
    run = read_run(tmp_path / "checkpoints" / "datafree-cmi" / "run-mnist-mnist-gtsrb-kiop")
    assert run.artefact is not None
    assert [task.name for task in run.artefact.tasks] == ["gtsrb", "mnist"]
    assert run.metrics[0]["accuracy"].keys() == {"gtsrb", "mnist"}


def test_what_is_left_behind(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_best(monkeypatch)
    result = go("--ep_steps", "6", "--synthesis_batch_size", "10")  # two rounds an epoch
    saved = pth()
    assert (saved["epoch"], saved["arch"]) == (2, "gtsrb")
    cells = kiop_fast.load_prompt(result.artefact).cells
    for name, inner, outer, ring in (("modelA", 16, 20, cells[0]), ("modelD", 20, 28, cells[1])):
        program, mask = (saved["state_dict"][f"{name}.{part}"] for part in ("program", "mask"))
        border = border_index(inner, outer)
        left = (outer - inner + 1) // 2
        assert not mask[:, left : left + inner, left : left + inner].any()
        assert mask.sum() == 3 * (outer**2 - inner**2)
        assert torch.equal(program.flatten(1)[:, border].half(), ring)
        assert not program[mask == 0].any()
        assert program.any()
    assert len(list((work / "run" / "b").glob("*.png"))) == 40  # 2 epochs, 2 rounds, 10 images
    banks = read_run(result.out).banks
    for folder, task in (("b", "mnist"), ("a", "gtsrb")):
        picture = np.array(Image.open(work / "run" / folder / "3-9.png"))
        assert np.array_equal(picture, banks[task].images[39].permute(1, 2, 0).numpy())
    sheet = Image.open(work / "checkpoints" / "datafree-cmi" / "synthetic.png")
    assert sheet.size == (4 * 17 - 1, 3 * 17 - 1)
    again = go("--save_dir", "c", "--save_dir_1", "d")  # the old run folder stays
    assert again.out.name == "run-mnist-mnist-gtsrb-2"


def test_the_optimizer_loads_into_torchs_own(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the scripts resume: SGD over prompts and model together, and its cosine."""
    always_best(monkeypatch)
    go()
    saved = pth()
    rings = [nn.Parameter(saved["state_dict"][f"{m}.program"]) for m in ("modelA", "modelD")]
    optimizer = torch.optim.SGD([*rings, *Tiny(SIGNS).parameters()], 0.8, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["scheduler"])
    assert schedule.last_epoch == 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    for ring in rings:
        buffer = optimizer.state[ring]["momentum_buffer"]
        assert buffer.shape == ring.shape
        assert buffer.any()


def test_the_mapping_is_the_one_the_script_draws(work: Path) -> None:
    """RLM by the seed, and its own task's accuracy is measured through it."""
    from kiop_fast.dropin.flags import parse

    result = go()
    flags, _ = parse("KiOP_BF", FLAGS)
    (mapping,) = replay_mappings("KiOP_BF", flags, {"dataset": DIGITS, "real_dataset": SIGNS})
    assert torch.equal(kiop_fast.load_prompt(result.artefact).task("mnist").mapping, mapping)


def test_mode_b_and_one_undivided_ring(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_best(monkeypatch)
    go("--vp2_size", "20", script="KiOP_B")
    names = list(pth()["state_dict"])
    assert [n for n in names if not n.startswith("modelB.")] == ["modelA.program", "modelA.mask"]
    assert not (work / "run" / "a").exists()
    go("--vp2_size", "20", "--save_dir", "x", "--save_dir_1", "y")
    state = pth()["state_dict"]  # KiOP_BF has a modelD there, which does nothing
    assert state["modelD.program"].shape == (3, 20, 20)
    assert not state["modelD.mask"].any()


def test_three_models(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_best(monkeypatch)
    write_mnist(work / "data" / "torchdata", 20, 23, name="FashionMNIST")
    write_source(work / "Tiny_32_fmnist", "tiny", DIGITS, 3)
    result = go("--son_dataset", "fmnist", "--backbone_l", "Tiny", "--vp3_size", "32",
                "--save_dir_2", "run/c", script="KiOP_Triple.py")  # fmt: skip
    ends = r"Acc@1_son=[\d.]+ Acc@5_son=[\d.]+ Loss_son=[\d.]+ Lr=0\.4000"
    assert re.search(r"\[Eval\] " + EVAL + ends, "\n".join(lines()))
    saved = pth()
    assert "modelE.program" not in saved["state_dict"]  # as the script
    own = saved["kiop_fast"]
    assert own["state_dict_son"]["modelE.program"].shape == (3, 32, 32)
    assert len({*own["mappings"][0].tolist(), *own["mappings"][1].tolist()}) == 20
    assert kiop_fast.load_prompt(result.artefact).rings == (20, 28, 32)
    assert len(list((work / "run" / "c").glob("*.png"))) == 16
    momentum = saved["optimizer"]["state"]
    assert [tuple(momentum[i]["momentum_buffer"].shape) for i in momentum] == [
        (3, 20, 20), (3, 28, 28), (3, 32, 32)]  # fmt: skip


def test_a_run_goes_on_to_the_same_numbers(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume with the run folder still there is exact; --epochs was 2 in both."""
    always_best(monkeypatch)
    whole = go()
    from kiop_fast.dropin.command import Job

    class Stop(Exception):
        pass

    def stop(self: Any, run: Any, metrics: Any, timings: Any) -> None:
        after(self, run, metrics, timings)
        if metrics["epoch"] == 2 and not go_on:
            raise Stop

    after, go_on = Job.on_epoch, []
    monkeypatch.setattr(Job, "on_epoch", stop)
    elsewhere = ["--save_dir", "c", "--save_dir_1", "d", "--student", "again"]
    # Stopped in epoch 2 before it is committed: the .pth of epoch 1 is restored by hand.
    first: list[bytes] = []
    real = torch.save

    def save(value: Any, file: Any) -> None:
        real(value, file)
        first.append(file.getvalue())

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Stop):
        go(*elsewhere)
    path = work / "checkpoints" / "datafree-cmi" / "mnist-mnist-again.pth"
    path.write_bytes(first[0])
    go_on.append(True)
    rest = go(*elsewhere, "--resume", str(path))
    assert rest.out.name == "run-mnist-mnist-again"
    for a, b in zip(*(kiop_fast.load_prompt(r.artefact).cells for r in (whole, rest)), strict=True):
        assert torch.equal(a, b)


def test_resume_from_a_pth_of_the_scripts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry of ours, no run folder: prompt, momentum and epoch are taken over."""
    always_best(monkeypatch)
    go("--epochs", "1")
    saved = pth()
    del saved["kiop_fast"]
    torch.save(saved, "theirs.pth")
    result = go("--epochs", "3", "--resume", "theirs.pth", "--student", "more")
    epochs = [line for line in lines("mnist-mnist-more") if "[Eval]" in line]
    assert [re.findall(r"Epoch=(\d)", line)[0] for line in epochs] == ["1", "2"]
    assert "Lr=0.6000" in epochs[0]  # 0.8 (1 + cos(π/3)) / 2
    assert kiop_fast.load_prompt(result.artefact).metrics["epoch"] == 3
    with pytest.raises(ArtefactError, match="other rings"):
        go("--epochs", "3", "--resume", "theirs.pth", "--vp2_size", "24")
    with pytest.raises(ConfigError, match="nothing is left"):
        go("--epochs", "1", "--resume", "theirs.pth")


def test_start_epoch_and_evaluate_only(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    always_best(monkeypatch)
    go("--epochs", "3", "--start_epoch", "2")
    done = [line for line in lines() if "[Eval]" in line]
    assert ["Epoch=2" in line and "Lr=0.2000" in line for line in done] == [True]
    accuracy = re.findall(r"Acc@1=([\d.]+)", done[0])[0]
    capsys.readouterr()
    assert go("--evaluate_only", "--resume", "mnist-mnist-gtsrb.pth") is None
    assert capsys.readouterr().out.splitlines()[-1] == f"[Eval] Acc={accuracy}"


def test_half_precision_and_images_given(work: Path) -> None:
    (work / "inverted" / "x").mkdir(parents=True)
    Image.new("RGB", (20, 20), (200, 0, 0)).save(work / "inverted" / "x" / "1.png")
    seen: list[bool] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(o.dtype == torch.bfloat16) if isinstance(m, Tiny) else None
    )
    try:
        result = go("--fp16", "--cmi_init", "inverted", "--epochs", "1")
    finally:
        handle.remove()
    assert any(seen)  # prompt steps
    assert not all(seen)  # synthesis and evaluation
    banks = read_run(result.out).banks
    assert len(banks["mnist"].images) == 8  # the given image is in the pool, not made by the run
    assert not (work / "run" / "b" / "1-0.png").exists()
    with pytest.raises(ConfigError, match="folder of images"):
        go("--cmi_init", "data/nothing", "--save_dir", "c", "--save_dir_1", "d")


def test_grey_images_and_a_seed_that_is_drawn(work: Path) -> None:
    at = FLAGS.index("--seed")
    given = [*FLAGS[:at], *FLAGS[at + 2 :]]
    result = run_upstream("KiOP_BF", [*given, "--cn", "1", "--epochs", "1"])
    banks = read_run(result.out).banks
    assert banks["mnist"].images.shape[1] == 1
    assert banks["gtsrb"].images.shape[1] == 3
    assert any("note: no --seed" in line for line in lines())
    assert any(line.endswith("seed: None") for line in lines())


def test_bad_input_while_reading(work: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        go("--data_root", "elsewhere")
    (work / "run" / "b").mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(work / "run" / "b" / "0-0.png")
    with pytest.raises(ConfigError, match="images of an earlier run"):
        go()
    (work / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ArtefactError, match="no checkpoint of the scripts"):
        go("--resume", "broken.pth")


def test_the_command_of_the_command_line(work: Path) -> None:
    said = CliRunner().invoke(app, ["upstream", "KiOP_BF", *FLAGS, "--epochs", "1", "-j", "2"])
    assert said.exit_code == 0, said.output
    assert "note: --workers has no effect" in said.output
    wrong = CliRunner().invoke(app, ["upstream", "KiOP_BF", "--method", "gan"])
    assert wrong.exit_code == 2
    assert "invalid choice" in wrong.output


def test_a_script_has_its_own_help() -> None:
    said = CliRunner().invoke(app, ["upstream", "KiOP_BF", "--help"])
    assert said.exit_code == 0
    assert "--method" in said.output
