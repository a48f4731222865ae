"""Tests that the README's picture and lines of results come from the kept runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tools import r1_headline


def run(learned: float) -> dict[str, Any]:
    """A summary in which every mode except ``never`` and ``rl`` reaches 0.7."""
    modes = {mode: {"hit@1": 0.7, "tokens_per_query": 8.0} for mode in ("always_reason", "threshold", "oracle")}
    modes |= {"never": {"hit@1": 0.5, "tokens_per_query": 0.0}, "rl": {"hit@1": learned, "tokens_per_query": 4.0}}
    return {"modes": modes}


def test_lines_are_means_over_the_runs(tmp_path: Path) -> None:
    results = tmp_path / "r1_seeds.json"
    assert r1_headline.lines(results) == "No results are kept yet."
    results.write_text(json.dumps([run(0.6), run(0.7)]))
    assert "hit@1 0.500, mean over eight tasks and 2 seeds" in r1_headline.lines(results)
    assert "limited to about 50% of those tokens: 0.650. That is 0.050 more" in r1_headline.lines(results)


def test_picture_names_its_results(tmp_path: Path) -> None:
    results = tmp_path / "r1_seeds.json"
    results.write_text(json.dumps([run(0.6)]))
    picture = r1_headline.draw(results, tmp_path / "images" / "picture.png")
    with Image.open(picture) as drawn:
        assert drawn.info[r1_headline.SOURCE] == r1_headline.digest(results)
    assert [file.name for file in picture.parent.iterdir()] == ["picture.png"]


def test_committed_picture_is_of_the_kept_results() -> None:
    with Image.open(r1_headline.PICTURE) as drawn:
        stale = drawn.info[r1_headline.SOURCE] != r1_headline.digest(r1_headline.RESULTS)
    assert not stale, "run python -m tools.r1_headline"
