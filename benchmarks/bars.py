"""What is asked of the main job, beside what its runs reached: mean and sample standard deviation over seeds.

    python -m benchmarks.bars [benchmarks/results/r1_seeds.json]

Reads the runs that `benchmarks.r1_seeds` kept; measures nothing. Ends with status 1 if a bar is missed.
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

RESULTS = Path(__file__).parent / "results" / "r1_seeds.json"

Modes = Mapping[str, Mapping[str, Any]]
"""The modes of a `summary.json`."""


@dataclass(frozen=True)
class Bar:
    """A number of a run and its bound.

    Attributes:
        text: what the number is.
        bound: the most it may be, or the least.
        value: the number; raises KeyError where the run has no such mode or task.
        least: the bound is the least.
    """

    text: str
    bound: float
    value: Callable[[Modes], float]
    least: bool = True

    def judge(self, runs: Sequence[Modes]) -> dict[str, str]:
        """The bar as a row of a table; the mean over runs is what counts."""
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


def _hit(mode: str, task: str) -> Callable[[Modes], float]:
    return lambda modes: modes[mode]["by_task"][task]["hit@1"]


def _better(task: str) -> Callable[[Modes], float]:
    return lambda modes: max(_hit(mode, task)(modes) for mode in ("never", "always_reason"))


def _gain(task: str) -> Callable[[Modes], float]:
    return lambda modes: _hit("always_reason", task)(modes) - _hit("never", task)(modes)


def _since_control(mode: str) -> Callable[[Modes], float]:
    return lambda modes: modes[mode]["hit@1"] - modes[f"{mode}_before_control"]["hit@1"]


BARS = (
    Bar("`fact`, better path: hit@1", 0.95, _better("fact")),
    Bar("`name`, better path: hit@1", 0.6, _better("name")),
    Bar("`flagattr`, reasoned - direct", 0.25, _gain("flagattr")),
    Bar("`left1`, reasoned - direct", 0.25, _gain("left1")),
    Bar("`scenematch`, direct: hit@1", 0.9, _hit("never", "scenematch")),
    Bar(
        "`rl` - better of direct and reasoned, mean hit@1",
        -0.005,
        lambda modes: modes["rl"]["hit@1"] - max(modes[mode]["hit@1"] for mode in ("never", "always_reason")),
    ),
    Bar(
        "`rl`: tokens over those of always reasoning",
        0.65,
        lambda modes: modes["rl"]["tokens_per_query"] / modes["always_reason"]["tokens_per_query"],
        least=False,
    ),
    Bar("`rl` above a coin at equal tokens, mean hit@1", 0.04, lambda modes: modes["rl"]["above_random"]),
    Bar("direct path, after - before control", -0.005, _since_control("never")),
    Bar("reasoned path, after - before control", -0.005, _since_control("always_reason")),
)


def judged(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a bar."""
    return [bar.judge([summary["modes"] for summary in summaries]) for bar in BARS]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the bars; 1 if one is missed."""
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
