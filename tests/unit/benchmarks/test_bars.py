"""Tests that the bars are computed from summaries, and report what does not hold and what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars

TASKS = ("fact", "name", "flagattr", "left1", "scenematch")


def summary(direct: float, reasoned: float, learned: float, *, tokens: float = 5.0) -> dict[str, Any]:
    def mode(hit: float, tokens: float) -> dict[str, Any]:
        return {"hit@1": hit, "tokens_per_query": tokens, "by_task": {task: {"hit@1": hit} for task in TASKS}}

    return {
        "modes": {
            "never": mode(direct, 0.0),
            "always_reason": mode(reasoned, 10.0),
            "rl": mode(learned, tokens) | {"gain_over_random_routing": learned - (direct + reasoned) / 2},
            "never_before_control": mode(direct, 0.0),
            "always_reason_before_control": mode(reasoned + 0.01, 10.0),
        }
    }


def test_means_over_seeds_are_compared_with_the_bars() -> None:
    rows = {row["bar"]: row for row in bars.judged([summary(0.4, 0.7, 0.7), summary(0.6, 0.9, 0.92)])}
    assert len(rows) == len(bars.BARS)
    name = rows["`name`: hit@1, higher of `never` and `always_reason`"]
    assert (name["asked"], name["reached"], name["holds"]) == ("at least 0.6", "0.800 ± 0.141", "yes")
    assert rows["`flagattr`: hit@1, `always_reason` minus `never`"]["reached"].startswith("0.300")
    assert rows["`scenematch`: hit@1, `never`"]["holds"] == "no"
    assert rows["mean hit@1, `rl` minus the higher of `never` and `always_reason`"]["reached"].startswith("0.010")
    assert rows["mean tokens_per_query, `rl` divided by `always_reason`"] | {"bar": ""} == {
        "bar": "",
        "asked": "at most 0.65",
        "reached": "0.500 ± 0.000",
        "holds": "yes",
    }
    assert rows["mean hit@1, `always_reason` minus `always_reason_before_control`"]["holds"] == "no"
    assert rows["mean hit@1, `never` minus `never_before_control`"]["holds"] == "yes"


def test_a_bar_whose_row_a_run_lacks_is_not_measured() -> None:
    run = summary(0.4, 0.7, 0.7)
    del run["modes"]["rl"]
    rows = {row["bar"]: row for row in bars.judged([run])}
    assert rows["mean gain_over_random_routing, `rl`"]["reached"] == "not measured yet"


def test_the_status_is_1_if_a_bar_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "runs.json"
    results.write_text(json.dumps([summary(0.96, 0.97, 0.5, tokens=9.0)]), encoding="utf-8")
    assert bars.main([str(results)]) == 1
    assert (
        "| mean tokens_per_query, `rl` divided by `always_reason` | at most 0.65 | 0.900 | no |"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        bars.main([str(tmp_path / "nothing.json")])
