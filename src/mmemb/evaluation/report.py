"""What an evaluation leaves behind: a table in the terminal, a summary as JSON and page, gallery, curves, TensorBoard.

The schema of ``summary.json``::

    {"settings": {...},
     "modes": {mode: {"hit@1": x, "think_rate": x, "tokens_per_query": x, "queries_per_second": x, "above_random": x,
                      "by_task": {task: {"hit@1": x, "n": n, "candidates": m, ...}}}},
     "versions": {...},
     "seconds": x}

``think_rate`` is the share of queries thought about (the invocation ratio); ``above_random`` the hit@1 above the line
from ``never`` to ``always_reason`` at the same tokens a query, which a coin reaches; where both are there.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmemb.common.files import write_text
from mmemb.drawing.curves import draw_curves, write_curves
from mmemb.drawing.gallery import draw_gallery, write_gallery
from mmemb.evaluation.runner import mode_scores
from mmemb.types import EvaluationResults

_MODE_KEYS = ("hit@1", "think_rate", "tokens_per_query", "queries_per_second", "above_random")
_PACKAGES = ("mmemb", "torch", "lightning", "transformers", "torchmetrics", "peft", "bitsandbytes", "triton", "pillow")
_SCORES = ("hit@1", "hit@5", "mrr")
CHANCE = "chance"
_COLUMNS = 6
"""Modes beside each other in a printed table."""


def summary(results: EvaluationResults, *, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The content of ``summary.json``: see the module's docstring.

    Args:
        results: modes as evaluated; further ones (``pretrained``) may have been added by name. ``chance`` is added
            here.
        settings: what makes the numbers comparable, JSON-ready.
        seconds: what the run took.
    """
    modes = {mode: {**scores, **_above_random(scores, results.modes)} for mode, scores in results.modes.items()}
    sized = next((scores["by_task"] for scores in modes.values() if _has_chance(scores["by_task"])), None)
    if sized is not None:
        modes[CHANCE] = mode_scores({task: _chance(scores) for task, scores in sized.items()})
    return {
        "settings": dict(settings),
        "modes": {
            mode: {**{key: scores[key] for key in _MODE_KEYS if key in scores}, "by_task": scores["by_task"]}
            for mode, scores in modes.items()
        },
        "versions": versions(),
        "seconds": seconds,
    }


def _above_random(scores: Mapping[str, Any], modes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A mode's hit@1 above the line between never and always_reason at its tokens; empty where a number is missing."""
    ends = [modes.get(name, {}) for name in ("never", "always_reason")]
    if not all(key in each for each in (scores, *ends) for key in ("hit@1", "tokens_per_query")):
        return {}
    start, end = ends
    span = end["tokens_per_query"] - start["tokens_per_query"]
    if span <= 0:
        return {}
    share = (scores["tokens_per_query"] - start["tokens_per_query"]) / span
    return {"above_random": scores["hit@1"] - start["hit@1"] - share * (end["hit@1"] - start["hit@1"])}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result; those not installed are left out."""
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
    """The summary as a page: hit@1, hit@5 and MRR by task and mode, cost by mode, settings and versions."""
    lines = ["# Evaluation", ""]
    for score in _SCORES:
        header, rows = _grid(summary, score)
        lines += [f"## {score}", "", *_markdown_table(header, rows), ""]
    for title, (key, show) in _BY_TASK.items():
        lines += [f"## {title} by task", "", *_markdown_table(*_costs(summary, key, show)), ""]
    lines += [f"Seconds: {summary['seconds']:.0f}", ""]
    for title in ("settings", "versions"):
        listed = [[str(key), f"`{value}`"] for key, value in summary[title].items()]
        lines += [f"## {title.capitalize()}", "", *_markdown_table([title.rstrip("s"), "value"], listed), ""]
    return "\n".join(lines)


def print_table(summary: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Prints the modes with their means and costs, then hit@1 by task, in tables that fit a terminal of 80 columns."""
    console = console or Console()
    modes = _table("modes, means over tasks")
    means = {**{score: (score, _percent) for score in _SCORES}, **_COSTS}
    for index, title in enumerate(["", *means]):
        modes.add_column(title, justify="left" if index == 0 else "right")
    for mode, scores in summary["modes"].items():
        by_task = scores["by_task"]
        cells = [
            show(_mean(by_task, key) if key in _SCORES else None if mode == CHANCE else scores.get(key))
            for key, show in means.values()
        ]
        modes.add_row(mode.replace("_", " "), *cells)
    console.print(modes)
    names = list(summary["modes"])
    for start in range(0, len(names), _COLUMNS):
        part = {"modes": {mode: summary["modes"][mode] for mode in names[start : start + _COLUMNS]}}
        header, rows = _grid(part, "hit@1")
        rows = rows[: len(rows) - len(_COSTS)]
        table = _table("hit@1 by task")
        for index, title in enumerate(header):
            # Blanks instead of underscores, so that a narrow terminal breaks titles between words.
            table.add_column(title.replace("_", " "), justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row, end_section=row is rows[-2], style="bold" if row is rows[-1] else "")
        console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def publish(
    folder: str | Path, summary: Mapping[str, Any], results: EvaluationResults, *, logger: Any = None, step: int = 0
) -> list[Path]:
    """Writes everything into a run's folder, prints the table, and logs to TensorBoard where the logger has a writer.

    Args:
        folder: the run's folder.
        summary: as `summary` makes it.
        results: what it was made of.
        logger: a Lightning logger, or None; only one with a TensorBoard ``SummaryWriter`` as its ``experiment`` is
            written to.
        step: the step the results belong to.

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
    for mode, scores in summary["modes"].items():
        for key in _MODE_KEYS:
            if key in scores:
                writer.add_scalar(f"evaluation/{mode}/{key}", scores[key], step)
        for task, by_task in scores["by_task"].items():
            writer.add_scalar(f"evaluation_{task}/{mode}/hit@1", by_task["hit@1"], step)
    writer.add_text("evaluation/summary", markdown(summary), step)
    if results.records:
        writer.add_image("evaluation/gallery", np.asarray(draw_gallery(results)), step, dataformats="HWC")
    figure = draw_curves(results)
    if figure is not None:
        writer.add_figure("evaluation/quality_tokens", figure, step)


def _costs(
    summary: Mapping[str, Any], key: str, show: Callable[[float | None], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one cost's table: a row a task, then the mean; modes that have it."""
    modes = {
        mode: scores["by_task"]
        for mode, scores in summary["modes"].items()
        if mode != CHANCE and all(key in each for each in scores["by_task"].values())
    }
    tasks = dict.fromkeys(task for by_task in modes.values() for task in by_task)
    rows = [[task, *[show(by_task.get(task, {}).get(key)) for by_task in modes.values()]] for task in tasks]
    rows.append(["mean", *[show(_mean(by_task, key)) for by_task in modes.values()]])
    return ["task", *modes], rows


def _grid(summary: Mapping[str, Any], score: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one score's table: a row a task, then the mean; hit@1's also says what it cost."""
    modes = dict(summary["modes"])
    chance = modes.pop(CHANCE, None)
    if chance is not None:
        modes[CHANCE] = chance  # beside the others, at the end
    sizes = {task: (s["n"], s["candidates"]) for scores in modes.values() for task, s in scores["by_task"].items()}
    rows = []
    for task, (n, candidates) in sizes.items():
        cells = [_percent(scores["by_task"].get(task, {}).get(score)) for scores in modes.values()]
        rows.append([task, f"{n}/{candidates}", *cells])
    rows.append(["mean", "", *[_percent(_mean(scores["by_task"], score)) for scores in modes.values()]])
    if score != "hit@1":
        return ["task", "n/M", *modes], rows
    for title, (key, show) in _COSTS.items():
        rows.append([title, "", *["" if mode == CHANCE else show(scores.get(key)) for mode, scores in modes.items()]])
    return ["task", "n/M", *modes], rows


def _mean(by_task: Mapping[str, Mapping[str, Any]], score: str) -> float | None:
    """The mean over tasks, each counting once; None where a task lacks the score."""
    values = [scores[score] for scores in by_task.values() if score in scores]
    return sum(values) / len(values) if values and len(values) == len(by_task) else None


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] + ["---:"] * (len(header) - 1)), *map(line, rows)]


def _has_chance(by_task: Mapping[str, Mapping[str, float]]) -> bool:
    return bool(by_task) and all("chance" in scores for scores in by_task.values())


def _chance(scores: Mapping[str, float]) -> dict[str, float]:
    hit = scores["chance"]
    return {
        "hit@1": hit,
        "n": scores["n"],
        "candidates": scores["candidates"],
        "think_rate": 0.0,
        "tokens_per_query": 0.0,
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _finite(value: Any) -> Any:
    """JSON has no nan or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "think rate": ("think_rate", _percent),
    "tokens a query": ("tokens_per_query", _number),
    "queries a second": ("queries_per_second", _number),
    "above random": ("above_random", _percent),
}
"""Rows below the table of hit@1."""
_BY_TASK = {"Think rate": _COSTS["think rate"], "Tokens": _COSTS["tokens a query"]}
