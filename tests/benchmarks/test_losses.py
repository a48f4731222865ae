"""The loss benchmarks run, and their rows say what was measured where."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are modules of the checkout, not of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def harness() -> ModuleType:
    return importlib.import_module("benchmarks.harness")


@pytest.mark.parametrize(
    ("name", "rivals", "ratio"),
    [("infonce", {"mmemb", "naive"}, "ratio_to_floor"), ("gradcache", {"cached", "plain"}, "ratio_to_plain")],
)
def test_a_smoke_run_appends_a_row_a_rival(
    name: str, rivals: set[str], ratio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"benchmarks.{name}").main
    argv = ["--smoke", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path)]
    main(argv)
    once = (tmp_path / f"{name}_smoke.jsonl").read_text().splitlines()
    main(argv)
    rows = [json.loads(line) for line in (tmp_path / f"{name}_smoke.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(once)
    assert {row["rival"] for row in rows} == rivals
    for row in rows:
        assert row[ratio] > 0
        assert row["peak_mb"] > 0
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["commit"]
    printed = capsys.readouterr().out
    assert ratio in printed
    assert f"appended to {tmp_path / f'{name}_smoke.jsonl'}" in printed


def test_peak_memory_counts_what_lives_at_once() -> None:
    def function() -> torch.Tensor:
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(1000, 500)  # 2 MB more
        del first, second
        return torch.empty(1000, 250)

    assert harness().peak_megabytes(function, device="cpu") == pytest.approx(3, rel=0.01)


def test_ratios_pair_repetitions() -> None:
    # The machine was ten times slower in the second repetition: the ratio does not see it.
    assert harness().median_ratio([2.0, 30.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_rivals_are_timed_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = harness().paired(functions, repeats=2, device="cpu")
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
