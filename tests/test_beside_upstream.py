"""The authors' code beside ours.  Needs its checkout: set KIOP_UPSTREAM to the folder.

The checkout runs in processes of its own (tests/beside_upstream.py says how it is adapted from
outside, tests/beside_draws.py which draws are fed).
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from upstream_files import working_folder, write_vgg_signs

CHECKOUT = os.environ.get("KIOP_UPSTREAM", "")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="KIOP_UPSTREAM names no checkout of the authors' code"),
    pytest.mark.slow,
]
TESTS = Path(__file__).parent
FLAGS = """--method cmi --cn 3 --dataset mnist --real_dataset gtsrb --backbone_t ResNet18
--backbone_s ResNet18 --teacher mnist --student gtsrb --img_size 32 --vp1_size 36 --vp2_size 48
--batch_size 16 --g_steps 3 --kd_steps 3 --ep_steps 3 --epochs 2 --adv 0.5 --bn 1 --oh 1 --cr 0.8
--cr_T 0.6 --T 20 --lr 0.8 --lr_g 0.01 --seed 0"""


def call(folder: Path, *line: str, double: bool = False) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    environment |= {"BESIDE_DOUBLE": "1"} if double else {}
    said = subprocess.run([sys.executable, *line], cwd=folder, env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    return said.stdout


def beside(folder: Path, way: str, draws: str, *change: str, double: bool = False) -> Any:
    flags = [*FLAGS.split(), "--save_dir", f"{way}/b", "--save_dir_1", f"{way}/a", *change]
    program = str(TESTS / "beside_upstream.py")
    call(folder, program, str(Path(CHECKOUT).resolve()), "KiOP_BF.py", way, draws, f"{way}.json",
         "--", *flags, double=double)  # fmt: skip
    return json.loads((folder / f"{way}.json").read_text())


def test_fed_the_same_draws_all_three_have_the_same_losses(tmp_path: Path) -> None:
    """Every loss of both periods and every byte of every image, in double precision: the script,
    the script under the patch, and our command (whose mapping is the replayed one)."""
    folder = working_folder(tmp_path, 43, 43)
    change = ["--batch_size", "8", "-j", "0"]
    plain = beside(folder, "plain", "draws.pt", *change, double=True)
    patched = beside(folder, "patched", "draws.pt", *change, double=True)
    flags = [*FLAGS.split(), "--save_dir", "command/b", "--save_dir_1", "command/a", *change]
    call(folder, str(TESTS / "beside_upstream.py"), CHECKOUT, "command", "draws.pt", "command.json",
         "--", *flags, double=True)  # fmt: skip
    command = json.loads((folder / "command.json").read_text())
    assert patched["mappings"] == plain["mappings"]
    assert patched["counts"]["CMISynthesizer.synthesize"] == 4
    totals = [[x for call in calls for x in call] for calls in plain["totals"]]
    assert [len(t) for t in totals] == [6, 6]
    assert len(plain["kl"]) == 12
    for way, ours in (("patched", patched), ("command", command)):
        for mine, theirs in zip(ours["totals"], totals, strict=True):
            assert [x for call in mine for x in call] == pytest.approx(theirs, rel=1e-9), way
        assert ours["kl"] == pytest.approx(plain["kl"], rel=1e-9), way
        for name in "ab":
            names = [p.name for p in (folder / "plain" / name).iterdir()]
            same, *_ = filecmp.cmpfiles(folder / "plain" / name, folder / way / name, names,
                                        shallow=False)  # fmt: skip
            assert len(same) == len(names) == 16, way


def our_pth(folder: Path, *change: str, times: int = 1) -> tuple[dict[str, list[float]], Any]:
    """One epoch of our command: what it logged (top-1, top-5, loss of a task), and what their
    evaluators say of its .pth."""
    flags = [*FLAGS.split(), "--save_dir", "b", "--save_dir_1", "a", "--epochs", "1", *change]
    said = call(folder, "-m", "kiop_fast.upstream", "KiOP_BF.py", *flags)
    call(folder, str(TESTS / "beside_upstream.py"), str(Path(CHECKOUT).resolve()), "evaluate",
         "checkpoints/datafree-cmi/mnist-mnist-gtsrb.pth", "theirs.json", str(times))  # fmt: skip
    number, ours = r"([\d.]+)", {}
    for task, end in (("B", ""), ("A", "_tea")):
        line = rf"Acc@1{end}={number} Acc@5{end}={number} Loss{end}={number}"
        ours[task] = [float(x) for x in re.findall(line, said)[-1]]
    return ours, json.loads((folder / "theirs.json").read_text())


def test_our_pth_in_their_model_and_evaluator(tmp_path: Path) -> None:
    """The .pth of our command: load_state_dict, then both accuracies, top-5 and loss."""
    logged, theirs = our_pth(working_folder(tmp_path, 43, 83))
    for task, ours in logged.items():
        # One image of 83 may change sides: pixels are bytes here and floats there.
        assert ours[:2] == pytest.approx(theirs["rows"][0][task][:2], abs=100 / 83 + 1e-3)
        assert ours[2] == pytest.approx(theirs["rows"][0][task][2], rel=2e-3)


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: every file with a VGG takes half a gigabyte."""
    yield working_folder(tmp_path, 43, 83)
    shutil.rmtree(tmp_path)


def test_our_pth_of_a_vgg_within_the_spread_of_its_dropout(large_folder: Path) -> None:
    """Model A is a vgg13_bn, whose dropout the scripts leave on while they measure.

    Their evaluator reads the .pth under eight torch seeds.  What our command logged is one more
    evaluation with masks of its own, so it must lie within three standard deviations of their
    mean, widened by sqrt(1 + 1/8) for the mean's own error, and by the one image that may change
    sides (as above).  That this is no empty claim: without dropout their own losses lie outside.
    """
    write_vgg_signs(large_folder / "vgg13_bn_gtsrb", 36, 3)
    change = ["--backbone_s", "vgg13", "--vp2_size", "40", "--g_steps", "1", "--kd_steps", "2",
              "--ep_steps", "2", "-j", "0", "--epochs", "1"]  # fmt: skip
    script = beside(large_folder, "plain", "-", *change)
    logged, theirs = our_pth(large_folder, *change, times=8)
    assert theirs["mappings"] == script["mappings"]
    for task, ours in logged.items():
        rows = list(zip(*(row[task] for row in theirs["rows"]), strict=True))
        assert statistics.stdev(rows[2]) > 0
        near = [3 * statistics.stdev(row) * (1 + 1 / 8) ** 0.5 for row in rows]
        slack = [100 / 83 + 1e-3, 100 / 83 + 1e-3, 2e-3 * ours[2]]
        for value, row, wide, more in zip(ours, rows, near, slack, strict=True):
            assert value == pytest.approx(statistics.mean(row), abs=wide + more), (task, rows)
        still = theirs["still"][task][2]
        assert abs(still - statistics.mean(rows[2])) > near[2] + slack[2], (task, still, rows)
