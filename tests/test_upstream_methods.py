"""The scripts' other methods through the command: deepinv, zskt, dfad, dafl, dfq."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upstream_runs import always_best, go, pth, tiny_folder

from kiop_fast.deliver.run_data import read_run
from kiop_fast.dropin import methods


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("method", ["deepinv", "zskt", "dfad", "dafl", "dfq"])
def test_other_methods(method: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_best(monkeypatch)
    monkeypatch.setattr(methods, "FRESH", 12)
    result = go("--method", method, "--balance", "1", "--act", "0.1", "--g_steps", "4")
    assert pth(method=method)["epoch"] == 2
    count = 16 if method == "deepinv" else 24
    images = read_run(result.out).banks["mnist"].images
    assert images.shape == (count, 3, 16, 16)
    assert images.float().std() > 1
    losses = read_run(result.out).metrics[-1]["loss"]
    assert all(np.isfinite(list(losses.values())))
    if method == "deepinv":
        assert len(list((work / "run" / "b").glob("*.png"))) == 16
    else:
        assert not (work / "run").exists()


@pytest.mark.parametrize("method", ["deepinv", "dafl"])
def test_other_methods_do_what_they_are_for(
    method: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm matching and class prior fall while images are made."""
    rows: list[Any] = []
    kind = methods.DeepInversion if method == "deepinv" else methods.GeneratorGame
    real: Callable[..., Any] = kind.synthesize

    def listen(self: Any, *given: Any, **named: Any) -> Any:
        rows.append(real(self, *given, **named))
        return rows[-1]

    monkeypatch.setattr(kind, "synthesize", listen)
    monkeypatch.setattr(methods, "FRESH", 4)
    go("--method", method, "--g_steps", "40", "--adv", "0", "--lr_g", "0.05", "--epochs", "1")
    total = rows[0].losses[:, -1]
    assert total[-5:].max() < total[:5].min()
