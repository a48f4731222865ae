"""Compares the results of the main job, mean and sample standard deviation over seeds, with their targets.

    python -m benchmarks.bars [benchmarks/results/r1_seeds.json]

Reads the runs that `benchmarks.r1_seeds` kept and measures nothing. The exit status is 1 if a bar does not hold.
The names of rows and scores are those of `mmemb.common.vocabulary`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemb.common.vocabulary import ALWAYS_REASON, NEVER, before_phase

RESULTS = Path(__file__).parent / "results" / "r1_seeds.json"

Modes = Mapping[str, Mapping[str, Any]]
"""The rows of a `summary.json`, with their scores."""


@dataclass(frozen=True)
class Bar:
    """A number from a run and its bound.

    Attributes:
        text: the number in words.
        bound: its maximum or minimum.
        value: computes the number from a run; raises KeyError if the run lacks the row or the task.
        least: whether the bound is a minimum.
    """

    text: str
    bound: float
    value: Callable[[Modes], float]
    least: bool = True

    def judge(self, runs: Sequence[Modes]) -> dict[str, str]:
        """The bar as a row of a table. The mean over runs is compared with the bound."""
        asked = f"{'at least' if self.least else 'at most'} {self.bound:g}"
        try:
            values = [self.value(modes) for modes in runs]
        except KeyError:
            return {"bar": self.text, "asked": asked, "reached": "not measured yet", "holds": ""}
        mean = statistics.mean(values)
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        holds = mean >= self.bound if self.least else mean <= self.bound
        return {
            "bar": self.text,
            "asked": asked,
            "reached": f"{mean:.3f}{spread}",
            "holds": "yes" if holds else "no",
        }


def _hit(row: str, task: str) -> Callable[[Modes], float]:
    return lambda modes: modes[row]["by_task"][task]["hit@1"]


def _better(task: str) -> Callable[[Modes], float]:
    return lambda modes: max(_hit(row, task)(modes) for row in (NEVER, ALWAYS_REASON))


def _gain(task: str) -> Callable[[Modes], float]:
    return lambda modes: _hit(ALWAYS_REASON, task)(modes) - _hit(NEVER, task)(modes)


def _since_control(row: str) -> Callable[[Modes], float]:
    return lambda modes: modes[row]["hit@1"] - modes[before_phase(row, "control")]["hit@1"]


BARS = (
    Bar("`fact`: hit@1, higher of `never` and `always_reason`", 0.95, _better("fact")),
    Bar("`name`: hit@1, higher of `never` and `always_reason`", 0.6, _better("name")),
    Bar("`flagattr`: hit@1, `always_reason` minus `never`", 0.25, _gain("flagattr")),
    Bar("`left1`: hit@1, `always_reason` minus `never`", 0.25, _gain("left1")),
    Bar("`scenematch`: hit@1, `never`", 0.9, _hit(NEVER, "scenematch")),
    Bar(
        "mean hit@1, `rl` minus the higher of `never` and `always_reason`",
        -0.005,
        lambda modes: modes["rl"]["hit@1"] - max(modes[row]["hit@1"] for row in (NEVER, ALWAYS_REASON)),
    ),
    Bar(
        "mean tokens_per_query, `rl` divided by `always_reason`",
        0.65,
        lambda modes: modes["rl"]["tokens_per_query"] / modes[ALWAYS_REASON]["tokens_per_query"],
        least=False,
    ),
    Bar("mean gain_over_random_routing, `rl`", 0.04, lambda modes: modes["rl"]["gain_over_random_routing"]),
    *(
        Bar(f"mean hit@1, `{row}` minus `{before_phase(row, 'control')}`", -0.005, _since_control(row))
        for row in (NEVER, ALWAYS_REASON)
    ),
)


def judged(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row per bar."""
    return [bar.judge([summary["modes"] for summary in summaries]) for bar in BARS]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the bars; returns 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="runs (default: %(default)s)")
    options = parser.parse_args(argv)
    if not options.results.is_file():
        parser.error(f"{options.results} does not exist; python -m benchmarks.r1_seeds writes it")
    rows = judged(json.loads(options.results.read_text(encoding="utf-8")))
    print(markdown(rows))
    return int(any(row["holds"] == "no" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
