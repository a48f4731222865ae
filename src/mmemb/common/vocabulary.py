"""The names of results, each defined once: rows, scores, and one plain sentence for each.

A result is a table. Its rows are ways to embed a query, mainly controllers under their short names. Its scores are the
columns. ``summary.json``, ``summary.md``, the terminal, the plots, TensorBoard and the README take the names, their
meanings and their order from here. Shares are fractions between 0 and 1, and never percentages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CHANCE, BEFORE_TRAINING, TRUE_RATIONALE = "chance", "before_training", "true_rationale"
NEVER, ALWAYS_REASON = "never", "always_reason"

ROWS: Mapping[str, str] = {
    CHANCE: "The candidates in random order.",
    BEFORE_TRAINING: "The row never, scored before the first training step.",
    NEVER: "No query reasons: each query is embedded directly (the direct path).",
    ALWAYS_REASON: "Every query reasons: the model writes a rationale first (the reasoned path).",
    "threshold": "A query reasons where its direct embedding is less confident than a fitted threshold.",
    "rl": "The model itself decides which queries reason, as it learned by reinforcement learning.",
    "random": "A query reasons with a fixed probability, whatever its content.",
    "oracle": "A query reasons only where this raises its hit@1. It knows the targets: an upper bound.",
    TRUE_RATIONALE: "The model reads the rationale given in the data and writes none.",
}
"""Row -> what it is, in the order of every table."""


@dataclass(frozen=True)
class Score:
    """A number that a row has.

    Attributes:
        meaning: what it is, as a sentence.
        decimals: how many of them tables show.
    """

    meaning: str
    decimals: int = 3


SCORES: Mapping[str, Score] = {
    "hit@1": Score("Share of queries whose first result is the target."),
    "hit@5": Score("Share of queries whose first five results include the target."),
    "mrr": Score("Mean over queries of 1 / rank of the target (mean reciprocal rank)."),
    "invocation_rate": Score("Share of queries that reason."),
    "tokens_per_query": Score("Mean number of rationale tokens per query."),
    "queries_per_second": Score("Queries embedded per second by one process (an estimate).", decimals=1),
    "gain_over_random_routing": Score(
        "hit@1 minus the hit@1 that a controller deciding at random reaches with the same number of tokens per query."
    ),
    "n": Score("Number of queries.", decimals=0),
    "candidates": Score("Mean number of candidates that a query is ranked among.", decimals=0),
}
"""Score -> its meaning, in the order of every table."""

_BEFORE_PHASE = re.compile(r"(?P<row>.+)_before_(?P<phase>.+)")


def before_phase(row: str, phase: str) -> str:
    """The name of a row that was scored before a phase of training began, as in ``never_before_control``."""
    return f"{row}_before_{phase}"


def ordered(rows: Iterable[str]) -> list[str]:
    """The rows in the order of `ROWS`; others follow in the order given."""
    places = {row: place for place, row in enumerate(ROWS)}
    return sorted(rows, key=lambda row: places.get(row, len(places)))


def row_meaning(row: str) -> str:
    """What a row is, as a sentence."""
    if row in ROWS:
        return ROWS[row]
    earlier = _BEFORE_PHASE.fullmatch(row)
    if earlier is not None:
        return f"The row {earlier['row']}, scored before the {earlier['phase']} phase."
    return f"The controller {row} of this run's configuration."


def legend(rows: Iterable[str], scores: Iterable[str]) -> dict[str, str]:
    """Name -> meaning of the rows that occur, in order, and then of the scores.

    Raises:
        KeyError: a score has no definition here.
    """
    return {row: row_meaning(row) for row in ordered(rows)} | {score: SCORES[score].meaning for score in scores}


def shown(score: str, value: float | None) -> str:
    """A score's value as every table shows it; empty for None."""
    return "" if value is None else f"{value:.{SCORES[score].decimals}f}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table; bars inside cells are escaped."""
    titles = list(header)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def markdown_legend(rows: Iterable[str], scores: Iterable[str]) -> list[str]:
    """The lines of `legend` as a Markdown table."""
    lines = ["| name | meaning |", "| --- | --- |"]
    return lines + [f"| `{name}` | {meaning} |" for name, meaning in legend(rows, scores).items()]
