"""Signals from outside: a terminal's Ctrl-C reaches every process of a run; ranks stop together."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import SIGINT, SIGTERM

from mmemb.__main__ import COMMANDS
from mmemb.training.callbacks.interrupt import InterruptCheckpoint, Interrupted

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from standins import StandInData, StandInModule
from mmemb.commands import train as cli
from mmemb.commands.parsing import lightning_cli
from mmemb.commands.parsing.errors import guarded
lightning_cli._trained = lambda: (StandInModule, StandInData)
if __name__ == "__main__":
    sys.exit(guarded(lambda: cli.main(sys.argv[1:])))
"""
EVERY_5 = "[{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 5, save_last: true, save_top_k: 0}}]"
WORDS = (
    "fit",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=-1",
    "--data.rows=64",
    "--trainer.callbacks",
    EVERY_5,
)


def start(*words: str) -> subprocess.Popen[str]:
    """A run without end, in a process group of its own as a terminal gives it."""
    Path("run.py").write_text(SCRIPT.format(here=str(HERE)), encoding="utf-8")
    command = [sys.executable, "run.py", *WORDS, *words]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_training(run: subprocess.Popen[str]) -> None:
    """Until the run has trained for a moment: it has written a checkpoint."""
    until = time.monotonic() + 120
    while time.monotonic() < until and run.poll() is None:
        if list(Path().rglob("last.ckpt")):
            return
        time.sleep(0.2)
    raise AssertionError(f"no training within two minutes: {run.communicate()[1]}")


def checkpoint_of(error: str) -> Path:
    found = re.search(r"mmemb: interrupted; resume with: mmemb fit .* --ckpt_path (\S+)", error)
    assert found, error
    return Path(found[1])


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_with_loader_processes(tmp_path: Path) -> None:
    run = start("--data.num_workers=1")
    wait_for_training(run)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert torch.load(checkpoint_of(error), weights_only=True)["global_step"] > 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_one_step(tmp_path: Path) -> None:
    run = start("--trainer.strategy=ddp", "--trainer.devices=2")
    wait_for_training(run)
    os.kill(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert torch.load(checkpoint_of(error), weights_only=True)["global_step"] > 0


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("embed", "mmemb: interrupted; run the same command again to continue where it stopped"),
        ("rationales", "mmemb: interrupted; run the same command again to continue where it stopped"),
        ("search", "mmemb: interrupted"),
        ("data", "mmemb: interrupted"),
        ("fit", "mmemb: interrupted"),
    ],
)
def test_ctrl_c_is_one_line_whatever_the_command(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str, line: str
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(COMMANDS[command][1]), "main", main)
    assert cli(command) == (130, "", line + "\n")
    with pytest.raises(KeyboardInterrupt):
        cli("--debug", command)


@pytest.fixture
def callback() -> InterruptCheckpoint:
    return InterruptCheckpoint()


def test_a_second_signal_does_not_wait(callback: InterruptCheckpoint) -> None:
    callback._training = True
    with callback.listening():
        signal.raise_signal(SIGINT)
        with pytest.raises(Interrupted):
            signal.raise_signal(SIGINT)


def test_a_signal_outside_training_acts_at_once(callback: InterruptCheckpoint) -> None:
    with callback.listening(), pytest.raises(Interrupted) as caught:
        signal.raise_signal(SIGTERM)
    assert caught.value.signum == SIGTERM


def test_handlers_are_put_back(callback: InterruptCheckpoint) -> None:
    before = signal.getsignal(SIGINT), signal.getsignal(SIGTERM)
    with callback.listening():
        assert signal.getsignal(SIGINT) != before[0]
    assert (signal.getsignal(SIGINT), signal.getsignal(SIGTERM)) == before


def test_a_forked_process_ignores_ctrl_c_and_ends_by_sigterm(callback: InterruptCheckpoint) -> None:
    with callback.listening():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            time.sleep(60)
            os._exit(3)
        os.kill(child, SIGINT)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
