"""Writes the results table of README.md from the runs kept in `benchmarks/results/r1_seeds.json`.

    python -m tools.update_readme            rewrite the part between the markers
    python -m tools.update_readme --check    only say whether it is up to date (exit code 1 if not)

The file is a JSON list with the `summary.json` of each run, one run a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from benchmarks import bars

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results:start -->", "<!-- results:end -->"
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


def section(results: Path) -> str:
    """What stands between the markers."""
    name = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    if not results.exists():
        return f"No results are kept yet (`{name}`)."
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    seeds = ", ".join(str(summary["settings"]["seed"]) for summary in summaries)
    of_seeds = f"seeds {seeds}: mean ± sample standard deviation" if len(summaries) > 1 else f"seed {seeds}"
    minutes = sorted({f"{summary['seconds'] / 60:.0f}" for summary in summaries}, key=int)
    at_once = max(summary["settings"].get("runs_at_once", 1) for summary in summaries)
    beside = f", {at_once} of them side by side" if at_once > 1 else ""
    return (
        f"hit@1 on the test split; {of_seeds}; {' to '.join(dict.fromkeys((minutes[0], minutes[-1])))} minutes a run"
        f"{beside}. This table is generated from `{name}` by `tools/update_readme.py`."
        f"\n\n{table(summaries)}\n\n{thinking(summaries)}".rstrip()
        + f"\n\nWhat is asked of the main job (`python -m benchmarks.bars`):\n\n{bars.markdown(bars.judged(summaries))}"
    )


def replaced(text: str, content: str) -> str:
    """The page with the part between the markers replaced.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"README.md needs {START} and {END}, each once and in this order")
    before, rest = text.split(START)
    return f"{before}{START}\n{content}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "r1_seeds.json")
    options = parser.parse_args(argv)
    old = options.readme.read_text(encoding="utf-8")
    new = replaced(old, section(options.results))
    if old == new:
        return 0
    if options.check:
        print("README.md does not show the kept results: run python -m tools.update_readme")
        return 1
    aside = options.readme.with_suffix(".md.part")
    aside.write_text(new, encoding="utf-8")
    os.replace(aside, options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
