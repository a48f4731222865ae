"""Tests that the seeds benchmark runs each seed once, keeps finished runs, and writes the list of summaries."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import r1_seeds


def _summary(seed: int, hit: float) -> dict[str, Any]:
    row = {"hit@1": hit, "n": 2, "candidates": 10, "chance": 0.1}
    return {"settings": {"seed": seed}, "modes": {"never": {"hit@1": hit, "by_task": {"name": row}}}, "seconds": 1.0}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have trained; each writes the summary of its seed."""
    ran: list[list[str]] = []

    def pretend(command: list[str], **_: Any) -> None:
        ran.append(command)
        folder = Path(command[command.index("--trainer.logger.save_dir") + 1])
        seed = int(command[command.index("--seed_everything") + 1])
        home = folder / command[command.index("--trainer.logger.name") + 1]
        home.mkdir(parents=True, exist_ok=True)
        (home / "summary.json").write_text(json.dumps(_summary(seed, seed / 10)), encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", pretend)
    return ran


def test_only_missing_seeds_are_run_and_all_are_written(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]
    extra = ["--trainer.max_steps", "5"]
    assert r1_seeds.main(["--seeds", "1", *arguments, *extra]) == 0
    assert r1_seeds.main(["--seeds", "1", "3", "--at-once", "2", *arguments, *extra]) == 0
    seeds = [command[command.index("--seed_everything") + 1] for command in commands]
    assert seeds == ["1", "3"]
    assert commands[1][-2:] == extra
    kept = json.loads((tmp_path / "results" / "r1_seeds.json").read_text(encoding="utf-8"))
    assert [run["settings"] for run in kept] == [{"seed": 1, "runs_at_once": 2}, {"seed": 3, "runs_at_once": 2}]
    assert "hit@1 0.200" in capsys.readouterr().out  # the mean of .1 and .3, which is 2.0 times a chance of .1


def test_an_interrupted_seed_resumes(tmp_path: Path, commands: list[list[str]]) -> None:
    last = tmp_path / f"seed_2-{r1_seeds.made_from([])}" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    r1_seeds.run(2, folder=tmp_path, at_once=1, extra=[])
    assert commands[0][-2:] == ["--ckpt_path", str(last)]


def test_a_run_that_fails_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(130, command)

    monkeypatch.setattr(subprocess, "run", stopped)
    assert r1_seeds.main(["--seeds", "1", "--folder", str(tmp_path), "--output", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err == "r1_seeds: a run ended with exit code 130; run the same command again to continue\n"
    )


def test_other_settings_start_another_run(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, recipe = tmp_path / "changes.yaml", tmp_path / "r1.yaml"
    monkeypatch.setattr(r1_seeds, "RECIPE", recipe)
    for text in ("a: 1", "a: 2"):
        recipe.write_text(text, encoding="utf-8")
        for steps in ("5", "6"):
            changes.write_text(f"steps: {steps}", encoding="utf-8")
            for _ in range(2):
                r1_seeds.run(1, folder=tmp_path, at_once=1, extra=["--config", str(changes)])
    assert len(commands) == 4


def test_a_word_that_is_too_long_for_a_file_name_counts_as_text() -> None:
    long = "[{path: bundled:validation}]" * 20
    assert r1_seeds.made_from([long]) == r1_seeds.made_from([long])
    assert r1_seeds.made_from([long]) != r1_seeds.made_from([long + " "])
