"""Tests that tables of results are made from the kept files, and that pages that are out of date are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import r1_tables, result_tables, update_docs


def summary(seed: int, hit: float, modes: tuple[str, ...] = ("never", "always_reason")) -> dict[str, Any]:
    """A summary with one task."""
    row = {
        "hit@1": hit,
        "invocation_rate": 0.0,
        "tokens_per_query": 0.0,
        "by_task": {"name": {"hit@1": hit, "n": 10, "candidates": 50, "chance": 0.02}},
    }
    return {"settings": {"seed": seed}, "modes": dict.fromkeys(modes, row), "versions": {}, "seconds": 60.0 * seed}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a README that has a table of the main job, an empty docs/ and the results of two runs."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- table: r1 -->\nof yesterday\n<!-- end of table -->\nafter\n")
    (tmp_path / "r1_seeds.json").write_text(json.dumps([summary(1, 0.5), summary(2, 0.7)]))
    return tmp_path


def update(project: Path, *more: str) -> int:
    """Runs the tool on a project whose results are next to its README."""
    return update_docs.main(["--root", str(project), "--results", str(project), *more])


def test_table_shows_mean_spread_and_chance(project: Path) -> None:
    assert update(project) == 0
    text = (project / "README.md").read_text()
    assert "| score, task | candidates | chance | never | always_reason |" in text
    assert "| hit@1, name | 50 | 0.020 | 0.600 ± 0.141 | 0.600 ± 0.141 |" in text
    assert "seeds 1, 2" in text
    assert "1 to 2 minutes" in text
    assert "| `name`: hit@1, higher of `never` and `always_reason` | at least 0.6 | 0.600 ± 0.141 |" in text
    legend = text.partition("| score, task |")[0]
    assert "| `always_reason` | Every query reasons" in legend
    assert "| `invocation_rate` | Share of queries that reason. |" in legend
    assert "of yesterday" not in text
    assert text.startswith("before\n<!-- table: r1 -->\n")
    assert text.endswith("\n<!-- end of table -->\nafter\n")


def test_check_names_the_stale_page_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project / "README.md").read_text()
    (project / "docs" / "plain.md").write_text("no table\n")
    assert update(project, "--check") == 1
    assert (project / "README.md").read_text() == before
    assert capsys.readouterr().out.startswith("README.md does not show the kept results")
    update(project)
    assert update(project, "--check") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: r1 -->\n", "needs an `<!-- end of table -->`"),
        ("<!-- end of table -->\n", "needs an `<!-- end of table -->`"),
        ("<!-- table: r1 -->\n<!-- table: r1 -->\n<!-- end of table -->\n", "needs an `<!-- end of table -->`"),
        ("<!-- table: r2 -->\n<!-- end of table -->\n", "unknown table r2; known tables: rows, scores, r1, "),
    ],
)
def test_the_error_for_a_wrong_marker_names_the_page(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (project / "docs" / "page.md").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        update(project)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "docs/page.md: " in error
    assert said in error


def test_every_table_is_on_one_page() -> None:
    shown = [name for page in update_docs.pages() for name in update_docs.names(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(update_docs.TABLES)


def test_one_run_has_no_spread() -> None:
    assert "| hit@1, name | 50 | 0.020 | 0.500 | 0.500 |" in r1_tables.table([summary(1, 0.5)])


def test_the_invocation_rate_is_shown_by_task_with_the_gain_from_reasoning() -> None:
    runs = [summary(1, 0.5, modes=("never", "always_reason", "rl")) for _ in range(2)]
    for run, rate in zip(runs, (0.25, 0.75), strict=True):
        row = {"hit@1": 0.9, "n": 10, "candidates": 50, "chance": 0.02, "invocation_rate": rate}
        run["modes"]["always_reason"] = run["modes"]["rl"] = {**run["modes"]["rl"], "by_task": {"name": row}}
    text = r1_tables.reasoning(runs)
    assert "| invocation_rate, `rl` | 0.500 ± 0.354 |" in text
    assert "| hit@1, `always_reason` minus `never` | 0.400 ± 0.000 |" in text
    assert r1_tables.reasoning([summary(1, 0.5)]) == ""


def test_a_row_that_only_some_runs_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="'always_reason' is in 1 of 2 runs"):
        r1_tables.table([summary(1, 0.5), summary(2, 0.5, modes=("never",))])


def test_without_results_the_page_says_that_there_are_none(project: Path) -> None:
    (project / "r1_seeds.json").unlink()
    update(project)
    assert "No results are kept yet" in (project / "README.md").read_text()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Writes a file of results with these rows, oldest first."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_newest_row_of_a_case_is_shown(tmp_path: Path) -> None:
    row = {"batch": 64, "rival": "mmemb", "ratio_to_floor": 9.0, "peak_mb": 9.0, "note": None, "device": "a CPU"}
    path = write(
        tmp_path / "gradcache.jsonl",
        {**row, "batch": 1024, "device": "another"},
        {**row, "batch": 256, "ratio_to_floor": None, "peak_mb": None, "note": "does not fit in 4000 MB"},
        row,
        {**row, "ratio_to_floor": 1.256, "peak_mb": 201.6},
        {**row, "rival": "plain", "ratio_to_floor": 1.0, "peak_mb": 300.0},
        {**row, "batch": 1024, "note": "not tried: 256 pairs: does not fit in 4000 MB"},
    )
    assert result_tables.gradcache(path, device="a CPU").splitlines()[2:] == [
        "| 64 | 1.26 (202 MB) | 1.00 (300 MB) |",
        "| 256 | does not fit in 4000 MB |  |",
        "| 1024 | not tried |  |",
    ]


def test_phases_are_those_of_the_last_run(tmp_path: Path) -> None:
    row = {"phase": "joint", "ratio_to_joint": 1.0, "peak_to_joint": 1.0}
    path = write(
        tmp_path / "phases.jsonl",
        {**row, "phase": "of yesterday"},
        {**row, "run": "a"},
        {"phase": "control", "ratio_to_joint": 2.5, "peak_to_joint": 0.5, "run": "a"},
    )
    assert result_tables.phases(path).splitlines()[2:] == ["| joint | 1.00 | 1.00 |", "| control | 2.50 | 0.50 |"]


def test_a_devices_table_has_only_its_rows(tmp_path: Path) -> None:
    row = {
        "backend": "cpu",
        "rival": "mmemb",
        "n": 8192,
        "width": 256,
        "dtype": "float32",
        "symmetric": False,
        "seconds": 1.0,
        "ratio_to_floor": 1.25,
        "extra_mb": 36.4,
        "run": "a",
        "device": "fast",
        "threads": 2,
    }
    path = write(tmp_path / "infonce.jsonl", row, {**row, "device": "slow", "ratio_to_floor": 1.1})
    smaller = {**row, "n": 2048, "rival": "naive", "ratio_to_floor": 2.0}
    rivals = write(tmp_path / "rivals.jsonl", row, {**row, "rival": "naive"}, {**row, "n": 4096}, smaller)
    assert result_tables.infonce(rivals, device="fast").splitlines()[2:] == [
        "| one direction, 2048 x 256 |  | 2.00 (36) |",
        "| one direction, 8192 x 256 | 1.25 (36) | 1.25 (36) |",
    ]
    half = write(tmp_path / "half.jsonl", row, {**row, "rival": "naive", "dtype": "bfloat16"})
    assert result_tables.infonce(half, device="fast", dtype="bfloat16").splitlines() == [
        "| case | naive |",
        "| --- | --- |",
        "| one direction, 8192 x 256 | 1.25 (36) |",
    ]
    wide = {**row, "n": 2048, "width": 1024, "symmetric": True, "device": "slow"}
    others = [{**wide, "rival": "naive"}, {**wide, "dtype": "bfloat16"}]
    sized = write(tmp_path / "sizes.jsonl", row, {**row, "device": "slow", "ratio_to_floor": 1.1}, *others, wide)
    assert result_tables.infonce_sizes(sized, device="slow").splitlines() == [
        "| N | D = 256, one direction | D = 1024, symmetric |",
        "| --- | --- | --- |",
        "| 2048 |  | 1.25 (36) |",
        "| 8192 | 1.10 (36) |  |",
    ]
    assert "time / floor | at most 1.12 | 1.10 | yes |" in result_tables.claims(path, backend="CPU", device="slow")
    assert "time / floor | at most 1.12 | 1.25 | no |" in result_tables.claims(path, backend="CPU", device="fast")
    assert "symmetric, 8192 x 256 float32: time / floor | at most 1.5 | not measured yet |  |" in result_tables.claims(
        path, backend="CPU", device="fast"
    )
    assert "GPU, 32768 x 1024 bfloat16: symmetric / one direction | at most 1.5 | not measured yet |  |" in (
        result_tables.claims(path, backend="GPU")
    )
