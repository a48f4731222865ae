"""Makes the results of the main job as Markdown from `benchmarks/results/r1_seeds.json`, for `tools.update_docs`.

The file is a JSON list with the `summary.json` of each run, one run per seed. `mmemb.common.vocabulary` names the rows
and scores of a summary. A table here has one column per row of a summary, since a README has space for tasks downwards.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from benchmarks import bars
from mmemb.common.vocabulary import (
    ALWAYS_REASON,
    CHANCE,
    NEVER,
    ROWS,
    before_phase,
    markdown_legend,
    markdown_table,
    shown,
)

ROOT = Path(__file__).resolve().parent.parent
_SHOWN = [row for row in ROWS if row != CHANCE]
"""Rows of `summary.json` that become columns, in order; a row that no run has gives no column."""
_MEANS = ("hit@1", "gain_over_random_routing", "invocation_rate", "tokens_per_query")
Summary = dict[str, Any]


def cell(score: str, values: Sequence[float]) -> str:
    """Mean over the seeds, with the sample standard deviation if there are several seeds; empty for nan."""
    if isnan(statistics.mean(values)):
        return ""
    mean = shown(score, statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {shown(score, statistics.stdev(values))}"


def columns(summaries: Sequence[Summary]) -> list[str]:
    """The rows that every run has.

    Raises:
        ValueError: only some runs have a row, so its mean would be over fewer runs than the other columns.
    """
    found = []
    for row in _SHOWN:
        having = [row in summary["modes"] for summary in summaries]
        if any(having) and not all(having):
            raise ValueError(f"the row {row!r} is in {sum(having)} of {len(having)} runs; keep runs of one recipe only")
        if all(having):
            found.append(row)
    return found


def legend(summaries: Sequence[Summary]) -> str:
    """The meaning of every row and score that `section` shows, as a Markdown table."""
    earlier = [before_phase(row, "control") for row in (NEVER, ALWAYS_REASON)]
    earlier = [row for row in earlier if all(row in summary["modes"] for summary in summaries)]
    return "\n".join(markdown_legend([CHANCE, *columns(summaries), *earlier], [*_MEANS, "candidates"]))


def table(summaries: Sequence[Summary]) -> str:
    """A Markdown table of hit@1 by task, and of the means of the scores over tasks.

    Args:
        summaries: the content of one `summary.json` per seed, at least one, all with the same tasks.
    """
    names = columns(summaries)
    first = summaries[0]["modes"][names[0]]["by_task"]
    lines = []
    for task, scores in first.items():
        hits = [[summary["modes"][row]["by_task"][task]["hit@1"] for summary in summaries] for row in names]
        sizes = [shown("candidates", scores["candidates"]), shown("hit@1", scores["chance"])]
        lines.append([f"hit@1, {task}", *sizes, *(cell("hit@1", values) for values in hits)])
    for score in _MEANS:
        means = [[summary["modes"][row].get(score, nan) for summary in summaries] for row in names]
        lines.append([f"**{score}, mean**", "", "", *(cell(score, values) for values in means)])
    return "\n".join(markdown_table(["score, task", "candidates", CHANCE, *names], lines))


def reasoning(summaries: Sequence[Summary]) -> str:
    """A Markdown table with a column per task: how often ``rl`` reasons, and how much reasoning raises hit@1.

    Returns:
        An empty text if the runs have no row ``rl``.
    """
    if "rl" not in columns(summaries):
        return ""
    tasks = summaries[0]["modes"]["rl"]["by_task"]

    def values(row: str, score: str, task: str) -> list[float]:
        return [summary["modes"][row]["by_task"][task][score] for summary in summaries]

    rates = [cell("invocation_rate", values("rl", "invocation_rate", task)) for task in tasks]
    paths = [zip(values(ALWAYS_REASON, "hit@1", task), values(NEVER, "hit@1", task), strict=True) for task in tasks]
    gains = [cell("hit@1", [reasoned - direct for reasoned, direct in path]) for path in paths]
    rows = [["invocation_rate, `rl`", *rates], [f"hit@1, `{ALWAYS_REASON}` minus `{NEVER}`", *gains]]
    return "\n".join(markdown_table(["score, row", *tasks], rows))


def _alone(path: Path) -> str:
    """Duration and results of one run of the recipe with nothing else on the machine."""
    summary: Summary = json.loads(path.read_text(encoding="utf-8"))
    never, always = (shown("hit@1", summary["modes"][row]["hit@1"]) for row in (NEVER, ALWAYS_REASON))
    return (
        f" `make run`, which orders the training data differently, took {summary['seconds'] / 60:.0f} minutes alone on "
        f"the machine, without the installation. Its mean hit@1 is {never} (`{NEVER}`) and {always} "
        f"(`{ALWAYS_REASON}`), from `{path.name}`."
    )


def section(results: Path) -> str:
    """The whole section about the main job, or a sentence that no results are kept yet.

    Args:
        results: the file with the summaries of the runs.
    """
    name = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    if not results.exists():
        return f"No results are kept yet (`{name}`)."
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    seeds = ", ".join(str(summary["settings"]["seed"]) for summary in summaries)
    of_seeds = f"seeds {seeds}: mean ± sample standard deviation" if len(summaries) > 1 else f"seed {seeds}"
    minutes = sorted({f"{summary['seconds'] / 60:.0f}" for summary in summaries}, key=int)
    span = " to ".join(dict.fromkeys((minutes[0], minutes[-1])))
    at_once = max(summary["settings"].get("runs_at_once", 1) for summary in summaries)
    parallel = f", with {at_once} runs in parallel" if at_once > 1 else ""
    alone = results.with_name("r1_alone.json")
    parts = [
        legend(summaries),
        f"Test split; {of_seeds}. Shares are fractions between 0 and 1, and means count every task once. A run took "
        f"{span} minutes{parallel}.{_alone(alone) if alone.exists() else ''} `tools/update_docs.py` generates this "
        f"section from `{name}`.",
        table(summaries),
        reasoning(summaries),
        "The targets of the main job, and whether they hold (`python -m benchmarks.bars`):",
        bars.markdown(bars.judged(summaries)),
    ]
    return "\n\n".join(part for part in parts if part)
