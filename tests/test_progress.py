"""Progress bars, and silence where there is no terminal."""

from __future__ import annotations

import io

import pytest

from kiop_fast.runtime.progress import RichProgress, SilentProgress, make_progress


class TestProgress:
    def test_silent_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with make_progress() as progress:
            assert isinstance(progress, SilentProgress)
            progress("store", 1, 2, loss=0.5)
        assert capsys.readouterr() == ("", "")

    def test_bars(self) -> None:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=100)
        with RichProgress(console, interval=0.0) as progress:
            for epoch in (1, 2):
                for stage in ("synthesize digits", "store"):
                    for done in range(1, 4):
                        progress(f"epoch {epoch}/2  {stage}", done, 3, loss=0.125)
                        progress._bars.refresh()
            assert progress._bars.tasks[0].completed == 200, "both epochs of the run"
        for word in ("epoch 2/2", "synthesize digits", "store", "loss 0.125"):
            assert word in text.getvalue()
