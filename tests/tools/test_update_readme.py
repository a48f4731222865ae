"""The results table is made from the runs, and says so when the page is out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import update_readme


def summary(seed: int, hit: float, modes: tuple[str, ...] = ("never", "always_reason")) -> dict[str, Any]:
    """A summary with one task."""
    row = {
        "hit@1": hit,
        "think_rate": 0.0,
        "tokens_per_query": 0.0,
        "by_task": {"name": {"hit@1": hit, "n": 10, "candidates": 50, "chance": 0.02}},
    }
    return {"settings": {"seed": seed}, "modes": dict.fromkeys(modes, row), "versions": {}, "seconds": 60.0 * seed}


@pytest.fixture
def page(tmp_path: Path) -> tuple[Path, Path]:
    """(README, results) with markers and two runs."""
    readme, results = tmp_path / "README.md", tmp_path / "seeds.json"
    readme.write_text(f"before\n{update_readme.START}\nof yesterday\n{update_readme.END}\nafter\n")
    results.write_text(json.dumps([summary(1, 0.5), summary(2, 0.7)]))
    return readme, results


def arguments(page: tuple[Path, Path], *more: str) -> list[str]:
    """Command-line arguments for a page."""
    return ["--readme", str(page[0]), "--results", str(page[1]), *more]


def test_table_shows_mean_spread_and_chance(page: tuple[Path, Path]) -> None:
    assert update_readme.main(arguments(page)) == 0
    text = page[0].read_text()
    assert "| task | candidates | chance | direct | reasoned |" in text
    assert "| name | 50 | 0.020 | 0.600 ± 0.141 | 0.600 ± 0.141 |" in text
    assert "seeds 1, 2" in text
    assert "1 to 2 minutes" in text
    assert "| `name`, better path: hit@1 | at least 0.6 | 0.600 ± 0.141 |" in text
    assert "of yesterday" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_check_tells_stale_from_current_and_writes_nothing(page: tuple[Path, Path]) -> None:
    before = page[0].read_text()
    assert update_readme.main(arguments(page, "--check")) == 1
    assert page[0].read_text() == before
    update_readme.main(arguments(page))
    assert update_readme.main(arguments(page, "--check")) == 0


def test_one_run_has_no_spread() -> None:
    assert "| name | 50 | 0.020 | 0.500 | 0.500 |" in update_readme.table([summary(1, 0.5)])


def test_thinking_is_shown_by_task_beside_what_it_gains() -> None:
    runs = [summary(1, 0.5, modes=("never", "always_reason", "rl")) for _ in range(2)]
    for run, rate in zip(runs, (0.25, 0.75), strict=True):
        row = {"hit@1": 0.9, "n": 10, "candidates": 50, "chance": 0.02, "think_rate": rate}
        run["modes"]["always_reason"] = run["modes"]["rl"] = {**run["modes"]["rl"], "by_task": {"name": row}}
    text = update_readme.thinking(runs)
    assert "| think rate of `rl` | 0.500 ± 0.354 |" in text
    assert "| hit@1, reasoned - direct | 0.400 ± 0.000 |" in text
    assert update_readme.thinking([summary(1, 0.5)]) == ""


def test_a_mode_of_some_runs_only_is_refused() -> None:
    with pytest.raises(ValueError, match="'always_reason' is in 1 of 2 runs"):
        update_readme.table([summary(1, 0.5), summary(2, 0.5, modes=("never",))])


def test_without_results_the_page_says_so(page: tuple[Path, Path]) -> None:
    page[1].unlink()
    update_readme.main(arguments(page))
    assert "No results are kept yet" in page[0].read_text()


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="each once and in this order"):
        update_readme.replaced("nothing here", "x")
