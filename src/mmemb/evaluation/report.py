"""Everything that an evaluation writes: a terminal table, a summary as JSON and page, a gallery, curves, TensorBoard.

The schema of ``summary.json``::

    {"settings": {...},
     "modes": {row: {"hit@1": x, "invocation_rate": x, "tokens_per_query": x, "queries_per_second": x,
                     "gain_over_random_routing": x, "by_task": {task: {"hit@1": x, "n": n, "candidates": m, ...}}}},
     "versions": {...},
     "seconds": x}

`mmemb.common.vocabulary` defines the rows and the scores. ``gain_over_random_routing`` needs the rows ``never`` and
``always_reason``; without them it is left out.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmemb.common.files import write_text
from mmemb.common.vocabulary import (
    ALWAYS_REASON,
    CHANCE,
    NEVER,
    legend,
    markdown_legend,
    markdown_table,
    ordered,
    shown,
)
from mmemb.drawing.curves import draw_curves, write_curves
from mmemb.drawing.gallery import draw_gallery, write_gallery
from mmemb.evaluation.runner import mode_scores
from mmemb.types import EvaluationResults

_GAIN = "gain_over_random_routing"
_ROW_SCORES = ("hit@1", "invocation_rate", "tokens_per_query", "queries_per_second", _GAIN)
"""Scores that ``summary.json`` has for a row as a whole."""
_QUALITY, _COSTS = ("hit@1", "hit@5", "mrr"), ("invocation_rate", "tokens_per_query")
_MEANS = (*_QUALITY, *_COSTS, "queries_per_second", _GAIN)
"""Columns of the table of means."""
_SIZES = ("n", "candidates")
_PACKAGES = ("mmemb", "torch", "lightning", "transformers", "torchmetrics", "peft", "bitsandbytes", "triton", "pillow")
_COLUMNS = 6
"""Rows shown next to each other in one terminal table of tasks."""


def summary(results: EvaluationResults, *, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The content of ``summary.json``: see the module's docstring.

    Args:
        results: rows as evaluated. The caller may have added others, such as ``before_training``. The row ``chance`` is
            added here.
        settings: what makes the numbers comparable, JSON-ready.
        seconds: duration of the run.
    """
    modes = {row: {**scores, **_gain_over_random(scores, results.modes)} for row, scores in results.modes.items()}
    sized = next((scores["by_task"] for scores in modes.values() if _has_chance(scores["by_task"])), None)
    if sized is not None:
        modes[CHANCE] = mode_scores({task: _chance(scores) for task, scores in sized.items()})
    return {
        "settings": dict(settings),
        "modes": {
            row: {**{score: scores[score] for score in _ROW_SCORES if score in scores}, "by_task": scores["by_task"]}
            for row, scores in modes.items()
        },
        "versions": versions(),
        "seconds": seconds,
    }


def _gain_over_random(scores: Mapping[str, Any], modes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A row's hit@1 above the line from never to always_reason at its tokens; empty where a number is missing."""
    ends = [modes.get(row, {}) for row in (NEVER, ALWAYS_REASON)]
    if not all(score in each for each in (scores, *ends) for score in ("hit@1", "tokens_per_query")):
        return {}
    start, end = ends
    span = end["tokens_per_query"] - start["tokens_per_query"]
    if span <= 0:
        return {}
    share = (scores["tokens_per_query"] - start["tokens_per_query"]) / span
    return {_GAIN: scores["hit@1"] - start["hit@1"] - share * (end["hit@1"] - start["hit@1"])}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a result; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_summary(folder: str | Path, summary: Mapping[str, Any]) -> list[Path]:
    """Writes ``summary.json`` and ``summary.md``, each whole or not at all; the folder is made."""
    contents = {
        "summary.json": json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "summary.md": markdown(summary),
    }
    return [write_text(Path(folder) / name, content) for name, content in contents.items()]


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page: the legend, the means over tasks, each score by task, settings and versions."""
    lines = ["# Evaluation", "", *markdown_legend(summary["modes"], [*_MEANS, *_SIZES]), ""]
    lines += ["Shares are fractions between 0 and 1. Means count every task once.", ""]
    lines += ["## Means over tasks", "", *markdown_table(*_means(summary)), ""]
    for score in (*_QUALITY, *_COSTS):
        lines += [f"## {score} by task", "", *markdown_table(*_by_task(summary, score)), ""]
    lines += [f"Seconds: {summary['seconds']:.0f}", ""]
    for title in ("settings", "versions"):
        listed = [[str(key), f"`{value}`"] for key, value in summary[title].items()]
        lines += [f"## {title.capitalize()}", "", *markdown_table([title.rstrip("s"), "value"], listed), ""]
    return "\n".join(lines)


def print_table(summary: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Prints the legend, the means over tasks and hit@1 by task, in tables that fit a terminal of 80 columns."""
    console = console or Console()
    names = ordered(summary["modes"])
    explained = Table("name", "meaning", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for name, meaning in legend(names, [*_MEANS, *_SIZES]).items():
        explained.add_row(name, meaning)
    console.print(explained)
    header, rows = _means(summary)
    console.print(_table("means over tasks", header, ([_broken(row[0], 14), *row[1:]] for row in rows)))
    for start in range(0, len(names), _COLUMNS):
        part = {"modes": {row: summary["modes"][row] for row in names[start : start + _COLUMNS]}}
        header, rows = _by_task(part, "hit@1")
        console.print(_table("hit@1 by task", header, rows, last_is_mean=True))


def _table(title: str, header: list[str], rows: Iterable[list[str]], *, last_is_mean: bool = False) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for index, name in enumerate(header):
        table.add_column(_broken(name, 10), justify="left" if index == 0 else "right", overflow="fold")
    listed = list(rows)
    for index, cells in enumerate(listed, 1):
        last = last_is_mean and index == len(listed)
        table.add_row(*cells, end_section=last_is_mean and index == len(listed) - 1, style="bold" if last else "")
    return table


def _broken(name: str, width: int) -> str:
    """A name over several lines, broken after underscores where a line would exceed the width."""
    lines = [""]
    for piece in re.split(r"(?<=_)", name):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def publish(
    folder: str | Path, summary: Mapping[str, Any], results: EvaluationResults, *, logger: Any = None, step: int = 0
) -> list[Path]:
    """Writes everything into a run's folder, prints the table, and logs to TensorBoard if the logger has a writer.

    Args:
        folder: the run's folder.
        summary: as `summary` makes it.
        results: the results that the summary was made from.
        logger: a Lightning logger, or None. Nothing is logged unless its ``experiment`` is a TensorBoard
            ``SummaryWriter``.
        step: the training step of the results.

    Returns:
        The files written.
    """
    folder = Path(folder)
    files = write_summary(folder, summary)
    if results.records:
        files.append(write_gallery(folder / "gallery.png", results))
        files += write_curves(folder, results)
    print_table(summary)
    writer = getattr(logger, "experiment", None)
    if hasattr(writer, "add_figure"):
        log_results(writer, summary, results, step=step)
    return files


def log_results(writer: Any, summary: Mapping[str, Any], results: EvaluationResults, *, step: int) -> None:
    """Logs every score, the gallery and the curves to a TensorBoard ``SummaryWriter``."""
    for row, scores in summary["modes"].items():
        for score in _ROW_SCORES:
            if score in scores:
                writer.add_scalar(f"evaluation/{row}/{score}", scores[score], step)
        for task, by_task in scores["by_task"].items():
            writer.add_scalar(f"evaluation_{task}/{row}/hit@1", by_task["hit@1"], step)
    writer.add_text("evaluation/summary", markdown(summary), step)
    if results.records:
        writer.add_image("evaluation/gallery", np.asarray(draw_gallery(results)), step, dataformats="HWC")
    figure = draw_curves(results)
    if figure is not None:
        writer.add_figure("evaluation/quality_tokens", figure, step)


def _means(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of means: one line per row, one column per score."""
    table = []
    for row in ordered(summary["modes"]):
        scores = summary["modes"][row]
        known = {score: _mean(scores["by_task"], score) for score in _QUALITY}
        if row != CHANCE:  # a random order needs no model, so it has no cost
            known |= {score: scores.get(score) for score in _MEANS if score not in _QUALITY}
        table.append([row, *(shown(score, known.get(score)) for score in _MEANS)])
    return ["", *_MEANS], table


def _by_task(summary: Mapping[str, Any], score: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one score's table: one line per task, then the mean; one column per row that has the score."""
    names = [row for row in ordered(summary["modes"]) if row != CHANCE or score not in _COSTS]
    modes = {row: summary["modes"][row]["by_task"] for row in names}
    modes = {row: tasks for row, tasks in modes.items() if any(score in scores for scores in tasks.values())}
    sizes = {task: [scores[size] for size in _SIZES] for tasks in modes.values() for task, scores in tasks.items()}
    table = []
    for task, counts in sizes.items():
        cells = [shown(score, tasks.get(task, {}).get(score)) for tasks in modes.values()]
        table.append([task, *map(shown, _SIZES, counts), *cells])
    table.append(["mean", "", "", *[shown(score, _mean(tasks, score)) for tasks in modes.values()]])
    return ["task", *_SIZES, *modes], table


def _mean(by_task: Mapping[str, Mapping[str, Any]], score: str) -> float | None:
    """The mean over tasks, where each counts once; None where a task lacks the score."""
    values = [scores[score] for scores in by_task.values() if score in scores]
    return sum(values) / len(values) if values and len(values) == len(by_task) else None


def _has_chance(by_task: Mapping[str, Mapping[str, float]]) -> bool:
    return bool(by_task) and all("chance" in scores for scores in by_task.values())


def _chance(scores: Mapping[str, float]) -> dict[str, float]:
    hit = scores["chance"]
    return {
        "hit@1": hit,
        "n": scores["n"],
        "candidates": scores["candidates"],
        "invocation_rate": 0.0,
        "tokens_per_query": 0.0,
    }


def _finite(value: Any) -> Any:
    """The value with null for nan and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
