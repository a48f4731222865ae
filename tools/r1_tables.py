"""The results of the main job as Markdown, from `benchmarks/results/r1_seeds.json`; `tools.update_docs` asks for it.

The file is a JSON list with the `summary.json` of each run, one run a seed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from benchmarks import bars

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "pretrained": "before training",
    "never": "direct",
    "always_reason": "reasoned",
    "threshold": "threshold",
    "rl": "rl",
    "random": "random",
    "oracle": "oracle",
    "true_rationale": "true rationale",
}
"""Modes of `summary.json` in the order of the columns, with their headings; a mode that no run has gives no column."""

_MEANS = {
    "hit@1": "mean",
    "above_random": "above a coin",
    "think_rate": "think rate",
    "tokens_per_query": "tokens a query",
}
Summary = dict[str, Any]


def cell(values: Sequence[float]) -> str:
    """Mean over the seeds, with the sample standard deviation where there is more than one; empty for nan."""
    if isnan(statistics.mean(values)):
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def columns(summaries: Sequence[Summary]) -> list[str]:
    """The modes that every run has.

    Raises:
        ValueError: a mode is in some runs only; its column would compare unlike things.
    """
    found = []
    for mode in MODES:
        having = [mode in summary["modes"] for summary in summaries]
        if any(having) and not all(having):
            raise ValueError(
                f"the mode {mode!r} is in {sum(having)} of {len(having)} runs; keep runs of one recipe only"
            )
        if all(having):
            found.append(mode)
    return found


def table(summaries: Sequence[Summary]) -> str:
    """A Markdown table: hit@1 a task and mode, then think rate and tokens a query.

    Args:
        summaries: the content of one `summary.json` a seed, at least one, all with the same tasks.
    """
    modes = columns(summaries)
    first = summaries[0]["modes"][modes[0]]["by_task"]
    lines = [
        "| task | candidates | chance | " + " | ".join(MODES[mode] for mode in modes) + " |",
        "| --- " * (3 + len(modes)) + "|",
    ]
    for task, scores in first.items():
        cells = [cell([summary["modes"][mode]["by_task"][task]["hit@1"] for summary in summaries]) for mode in modes]
        lines.append(f"| {task} | {scores['candidates']} | {scores['chance']:.3f} | " + " | ".join(cells) + " |")
    for key, title in _MEANS.items():
        cells = [cell([summary["modes"][mode].get(key, nan) for summary in summaries]) for mode in modes]
        lines.append(f"| **{title}** | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def thinking(summaries: Sequence[Summary]) -> str:
    """A Markdown table, a column a task: the think rate of the learned decision, and what thinking adds to hit@1.

    Returns:
        nothing, if the runs have no ``rl``.
    """
    if "rl" not in columns(summaries):
        return ""
    tasks = summaries[0]["modes"]["rl"]["by_task"]

    def values(mode: str, key: str, task: str) -> list[float]:
        return [summary["modes"][mode]["by_task"][task][key] for summary in summaries]

    rates = [cell(values("rl", "think_rate", task)) for task in tasks]
    paths = [zip(values("always_reason", "hit@1", task), values("never", "hit@1", task), strict=True) for task in tasks]
    gains = [cell([reasoned - direct for reasoned, direct in path]) for path in paths]
    return "\n".join(
        (
            "| | " + " | ".join(tasks) + " |",
            "| --- " * (1 + len(tasks)) + "|",
            "| think rate of `rl` | " + " | ".join(rates) + " |",
            "| hit@1, reasoned - direct | " + " | ".join(gains) + " |",
        )
    )


def _alone(path: Path) -> str:
    """What the recipe as it is took, with nothing beside it, and what it reached."""
    summary: Summary = json.loads(path.read_text(encoding="utf-8"))
    direct, reasoned = (summary["modes"][mode]["hit@1"] for mode in ("never", "always_reason"))
    return (
        f" `make run`, whose order of the training data is another, took {summary['seconds'] / 60:.0f} minutes by "
        f"itself (installation apart) and reached {direct:.3f} direct, {reasoned:.3f} reasoned (`{path.name}`)."
    )


def section(results: Path) -> str:
    """All of it, or that no results are kept yet.

    Args:
        results: the file.
    """
    name = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    if not results.exists():
        return f"No results are kept yet (`{name}`)."
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    seeds = ", ".join(str(summary["settings"]["seed"]) for summary in summaries)
    of_seeds = f"seeds {seeds}: mean ± sample standard deviation" if len(summaries) > 1 else f"seed {seeds}"
    minutes = sorted({f"{summary['seconds'] / 60:.0f}" for summary in summaries}, key=int)
    at_once = max(summary["settings"].get("runs_at_once", 1) for summary in summaries)
    alone = results.with_name("r1_alone.json")
    of_one = _alone(alone) if alone.exists() else ""
    beside = f", {at_once} of them side by side" if at_once > 1 else ""
    return (
        f"hit@1 on the test split; {of_seeds}; {' to '.join(dict.fromkeys((minutes[0], minutes[-1])))} minutes a run"
        f"{beside}.{of_one} This table is generated from `{name}` by `tools/update_docs.py`."
        f"\n\n{table(summaries)}\n\n{thinking(summaries)}".rstrip()
        + f"\n\nWhat is asked of the main job (`python -m benchmarks.bars`):\n\n{bars.markdown(bars.judged(summaries))}"
    )
