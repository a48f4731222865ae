"""Tests that the phase benchmark runs and compares a step of the control phase with one of the joint phase."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_a_smoke_run_compares_the_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    benchmark = importlib.import_module("benchmarks.phases")
    benchmark.main(["--smoke", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "phases_smoke.jsonl").read_text().splitlines()]
    joint, control, *_ = rows
    assert [row["phase"] for row in rows] == ["joint", "control", "joint, graphs kept", "joint, paths apart"]
    assert joint["ratio_to_joint"] == joint["peak_to_joint"] == 1
    assert [row["rollouts"] for row in rows] == [0, 8, 0, 0]
    assert control["peak_to_joint"] == pytest.approx(control["peak_mb"] / joint["peak_mb"])
