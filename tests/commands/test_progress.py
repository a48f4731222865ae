"""The bar counts what bounds the run, its steps or the batches of an epoch; without a terminal there are lines."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from standins import SIGINT, StandInData, StandInModule

from mmemb.commands import train as cli_module
from mmemb.common.terminal import output
from mmemb.training.callbacks.progress import PhaseAt, ProgressLines, StepsBar


def bar_of(**settings: Any) -> Any:
    """The task of the bar after a training with three batches an epoch."""
    bar = StepsBar()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(StandInModule(), datamodule=StandInData(rows=6))
    assert bar.progress is not None
    (task,) = bar.progress.tasks
    return task


def test_a_run_of_steps_has_one_bar_over_all_its_epochs() -> None:
    task = bar_of(max_steps=5, max_epochs=-1)
    assert (task.completed, task.total) == (5, 5)
    assert "Steps" in task.description


def test_a_run_of_epochs_has_lightnings_bar() -> None:
    task = bar_of(max_epochs=2)
    assert (task.completed, task.total) == (3, 3)
    assert "Epoch 1/1" in task.description


class Clock:
    """A second passes at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Phased(StandInModule):
    """Two steps of one phase, the rest of another."""

    def phase_at(self, step: int) -> PhaseAt:
        return PhaseAt("first", 0, 2) if step < 2 else PhaseAt("second", 2, 4)


LINE = re.compile(
    r"(\w+)  step (\d+)/(\d+) \(phase (\d+)/(\d+)\)  loss (-|\d+\.\d{3})  (-|[\d.]+) steps/s  "
    r"left (-:--:--|\d+:\d\d:\d\d)  [\d,]+ MB(, GPU [\d,]+ MB)?"
)


def told(text: str) -> list[tuple[str, ...]]:
    """The fields of every line of training: phase, step, steps, the phase's, loss, rate, time left."""
    found = [LINE.fullmatch(line[9:]) for line in text.splitlines() if " step " in line and "stopped" not in line]
    assert None not in found, text
    return [match.groups()[:8] for match in found if match]


def train(module: Any, folder: Path, every: float, *, clock: Any = time.monotonic) -> str:
    """The lines of a training of six steps."""
    out = io.StringIO()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[ProgressLines(stream=out, every=every, clock=clock)],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        max_steps=6,
    )
    trainer.fit(module, datamodule=StandInData(rows=12))
    assert (folder / "progress.log").read_text(encoding="utf-8") == out.getvalue()
    assert output().bars == []
    return out.getvalue()


def test_every_phase_begins_and_ends_with_a_line(tmp_path: Path) -> None:
    lines = told(train(Phased(), tmp_path, 1000))
    assert [line[:5] for line in lines] == [
        ("first", "0", "6", "0", "2"),
        ("first", "2", "6", "2", "2"),
        ("second", "2", "6", "0", "4"),
        ("second", "6", "6", "4", "4"),
    ]
    assert [line[5] == "-" for line in lines] == [True, False, True, False]
    assert lines[-1][7] == "0:00:00"


def test_lines_come_at_a_steady_pace_with_rate_and_time_left(tmp_path: Path) -> None:
    # Each look at the clock takes a second, and a line is due after four.
    lines = told(train(StandInModule(), tmp_path, 4, clock=Clock()))
    assert [line[0] for line in lines] == ["train"] * len(lines)
    assert [line[1] for line in lines] == ["0", "3", "6"]
    rate, left = lines[1][6:8]
    minutes, seconds = map(int, left.split(":")[1:])
    assert 60 * minutes + seconds == pytest.approx(3 / float(rate), abs=1)


def test_the_loss_is_the_mean_since_the_line_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    each = [float(line[5]) for line in told(train(StandInModule(), tmp_path / "a", 0))[1:]]
    torch.manual_seed(0)
    (_, last) = told(train(StandInModule(), tmp_path / "b", 1000))
    assert len(each) == 6
    assert float(last[5]) == pytest.approx(sum(each) / 6, abs=1e-3)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_command_shows_a_bar_on_a_terminal_and_lines_elsewhere(
    shown: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    argv = ["fit", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.enable_model_summary=false"]
    argv += [f"--trainer.enable_progress_bar={str(shown).lower()}"]
    assert cli_module.main(argv) == 0
    bars = [type(each) for each in StandInModule.seen[-1].trainer.callbacks if isinstance(each, ProgressBar)]
    assert bars == ([StepsBar] if shown and terminal else [])
    out = capsys.readouterr().out
    assert bool(told(out)) is (shown and not terminal)
    kept = Path("runs/default/version_0/progress.log").read_text(encoding="utf-8")
    assert [line[:2] for line in told(kept)] == [("train", "0"), ("train", "2")]
    assert "test  2/2 tasks" in kept


def test_an_interrupted_run_says_where_it_stopped(fit: Any) -> None:
    assert fit(f"--model.signal_at={SIGINT}") == 130
    last = Path("runs/default/version_0/progress.log").read_text(encoding="utf-8").splitlines()[-1]
    assert last.endswith("stopped  step 4/6  Interrupted")
    assert output().file is None


def test_a_dry_run_leaves_no_file(fit: Any) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert list(Path().rglob("progress.log")) == []
