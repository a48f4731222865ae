"""Tests that times are paired, that memory is the peak of one call, and that rows record their environment."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness


def test_peak_memory_counts_tensors_that_exist_at_once() -> None:
    def function() -> torch.Tensor:
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(1000, 500)  # 2 MB more
        del first, second
        return torch.empty(1000, 250)

    assert harness.peak_megabytes(function, device="cpu") == pytest.approx(3, rel=0.01)


def test_ratios_pair_repetitions() -> None:
    # The machine was ten times slower in the second repetition, which does not change the ratio.
    assert harness.median_ratio([2.0, 30.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize(("warm_up", "rounds"), [(True, 3), (False, 2)])
def test_rivals_are_timed_in_turn(warm_up: bool, rounds: int) -> None:
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = harness.paired(functions, repeats=2, device="cpu", warm_up=warm_up)
    assert calls == ["a", "b"] * rounds
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_the_wall_clock_counts_waiting() -> None:
    times, walls = harness.paired_clocks({"wait": lambda: time.sleep(0.05)}, repeats=2, device="cpu")
    assert len(times["wait"]) == len(walls["wait"]) == 2
    assert min(walls["wait"]) >= 0.05 > max(times["wait"])


def test_busy_time_is_shared_by_the_threads() -> None:
    assert harness.busy_seconds(3.0, device="cpu") == 3.0 / torch.get_num_threads()
    assert harness.busy_seconds(3.0, device="cuda") == 3.0


def test_rows_are_appended_with_their_environment(tmp_path: Path) -> None:
    for value in (1, 2):
        path = harness.append([{"value": value}], output=tmp_path / "new", name="x", smoke=False, device="cpu")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert path == tmp_path / "new" / "x.jsonl"
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["device"]
    assert rows[0]["commit"]
    assert rows[0]["run"] == rows[1]["run"]
    assert rows[0]["threads"] == torch.get_num_threads()


def test_a_table_shows_the_given_columns() -> None:
    rows = [{"a": 1.23456, "b": None, "c": "no"}, {"a": 12345.6, "b": 3, "c": "no"}]
    lines = harness.table(rows, columns=["a", "b"]).splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["1.23", "-"], ["12346", "3"]]


def test_a_script_adds_its_options_to_the_shared_ones(capsys: pytest.CaptureFixture[str]) -> None:
    parser = harness.parser("what it measures")
    parser.add_argument("--sizes", type=int, nargs="+")
    options = parser.parse_args(["--smoke", "--sizes", "1", "2"])
    assert (options.smoke, options.sizes, options.repeats, options.output) == (True, [1, 2], 5, harness.RESULTS)
    with pytest.raises(SystemExit):
        parser.parse_args(["--repeats", "0"])
    assert "is below 1" in capsys.readouterr().err


def test_a_missing_distribution_has_no_version() -> None:
    version = harness.version("torch")
    assert version is not None
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]  # a CUDA build has a suffix in one of them
    assert harness.version("no-such-distribution") is None
    assert harness.available_megabytes("cpu") > 100
