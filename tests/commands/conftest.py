"""The stand-ins are importable here, every test has a folder of its own, and `fit` runs the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from standins import QUIET, StandInData, StandInModule

from mmemb.commands import train as cli_module
from mmemb.commands.parsing import lightning_cli
from mmemb.commands.parsing.errors import guarded

Fit = Callable[..., int]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    StandInModule.seen.clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's commands run the stand-ins instead of the real module and its data."""
    monkeypatch.setattr(lightning_cli, "_trained", lambda: (StandInModule, StandInData))


@pytest.fixture
def fit(stand_ins: None) -> Fit:
    """Runs ``mmemb fit`` on the stand-ins; returns the exit code."""

    def run(*words: str) -> int:
        argv = ["fit", *QUIET, *words]
        return guarded(lambda: cli_module.main(argv))

    return run


@pytest.fixture
def mistake(fit: Fit, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``mmemb fit``, which must refuse with exit code 2 and one line; returns the line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert fit(*words) == 2
        lines = capsys.readouterr().err.strip().split("\n")
        told = [line for line in lines if line.startswith("mmemb: error: ")]
        assert len(told) == 1, lines
        assert lines[-1] == told[0]
        assert not any("Traceback" in line for line in lines)
        return told[0].removeprefix("mmemb: error: ")

    return run
