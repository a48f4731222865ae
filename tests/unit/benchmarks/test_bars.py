"""The bars read runs as they are, and say what is missed and what was not measured."""

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
            "rl": mode(learned, tokens) | {"above_random": learned - (direct + reasoned) / 2},
            "never_before_control": mode(direct, 0.0),
            "always_reason_before_control": mode(reasoned + 0.01, 10.0),
        }
    }


def test_means_over_seeds_are_held_against_the_bars() -> None:
    rows = {row["bar"]: row for row in bars.judged([summary(0.4, 0.7, 0.7), summary(0.6, 0.9, 0.92)])}
    assert len(rows) == len(bars.BARS)
    name = rows["`name`, better path: hit@1"]
    assert (name["asked"], name["reached"], name["holds"]) == ("at least 0.6", "0.800 ± 0.141", "yes")
    assert rows["`flagattr`, reasoned - direct"]["reached"].startswith("0.300")
    assert rows["`scenematch`, direct: hit@1"]["holds"] == "no"
    assert rows["`rl` - better of direct and reasoned, mean hit@1"]["reached"].startswith("0.010")
    assert rows["`rl`: tokens over those of always reasoning"] | {"bar": ""} == {
        "bar": "",
        "asked": "at most 0.65",
        "reached": "0.500 ± 0.000",
        "holds": "yes",
    }
    assert rows["reasoned path, after - before control"]["holds"] == "no"
    assert rows["direct path, after - before control"]["holds"] == "yes"


def test_what_a_run_does_not_have_is_not_measured() -> None:
    run = summary(0.4, 0.7, 0.7)
    del run["modes"]["rl"]
    rows = {row["bar"]: row for row in bars.judged([run])}
    assert rows["`rl` above a coin at equal tokens, mean hit@1"]["reached"] == "not measured yet"


def test_a_missed_bar_is_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "runs.json"
    results.write_text(json.dumps([summary(0.96, 0.97, 0.5, tokens=9.0)]), encoding="utf-8")
    assert bars.main([str(results)]) == 1
    assert "| `rl`: tokens over those of always reasoning | at most 0.65 | 0.900 | no |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bars.main([str(tmp_path / "nothing.json")])
