"""Quality against tokens: the hit@1 that more and more reasoning buys.

A controller is a point. As its cut moves, it becomes a curve. The curves are computed from the records of one
evaluation, without running the model: queries are sorted by a signal, and the first share of them takes the reasoned
path.

- ``rl``: first the queries on which the model prefers ``<think>`` most, as when the controller's offset rises;
- ``threshold``: the least confident queries first, as when the controller's threshold rises;
- ``oracle``: the largest gain of hit@1 per token first, which needs the targets and is an upper bound;
- ``random``: the straight line from ``never`` to ``always_reason``, the expected value of deciding at random.

Every task counts once, as in the summary. `mmemb.common.vocabulary` has the names.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmemb.common.files import whole_file, write_text
from mmemb.common.vocabulary import SCORES, ordered, row_meaning
from mmemb.types import EvaluationResults, QueryRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_LINES: Mapping[str, tuple[str, Literal["-", "--", ""]]] = {
    "threshold": ("#3f5fb5", "-"),
    "rl": ("#b3402f", "-"),
    "random": ("#66727f", "--"),
    "oracle": ("#2e7d5b", "-"),
}
_MARKERS = "os^DvPX*<>hpd"
_INK = "#1c2733"
_WIDTH, _HEIGHT, _LEGEND_LINE = 9.0, 4.6, 0.16
"""Width of the figure, height of the axes with their labels, and height per line of the legend, in inches."""
_LEGEND_LETTERS = 118
"""Letters per line of the legend, as many as fit the figure's width."""
_NOTE = "Marker: the row as it was evaluated. Line: the same decision rule as its cut moves from no query to all."


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        curve: the curve, named by its row.
        invocation_rate: share of queries that reason, where each task counts once.
        tokens_per_query: mean number of rationale tokens per query, where each task counts once.
        hit: hit@1, where each task counts once.
    """

    curve: str
    invocation_rate: float
    tokens_per_query: float
    hit: float


def quality_curves(records: Sequence[QueryRecord], *, steps: int = 50) -> list[Point]:
    """The curves, each from no query that reasons to all of them.

    Args:
        records: one per query. There are no curves unless every query has a reasoned path: the curves of a part of the
            queries could not be compared with the rows, which are of all queries.
        steps: points per curve, not counting its start.
    """
    known = [record for record in records if record.reasoned_hit is not None]
    if len(known) < len(records) or not known:
        return []
    keys: dict[str, Callable[[QueryRecord], float]] = {
        "rl": lambda record: -record.margin,
        "threshold": lambda record: record.confidence,
        "oracle": lambda record: -_gain(record) / max(record.tokens, 1),
    }
    curves = {name: _sweep(name, sorted(known, key=key), steps) for name, key in keys.items()}
    ends = curves["rl"][0], curves["rl"][-1]
    at_random = [Point("random", end.invocation_rate, end.tokens_per_query, end.hit) for end in ends]
    return [point for curve in curves.values() for point in curve] + at_random


def draw_curves(results: EvaluationResults) -> Figure | None:
    """The curves with every row as a marker, and the legend on top; None unless every query has a reasoned path."""
    points = quality_curves(results.records)
    if not points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    placed = {row: scores for row, scores in results.modes.items() if "tokens_per_query" in scores}
    handles = _handles(placed)
    height = _HEIGHT + _LEGEND_LINE * (2 + sum(1 + str(each.get_label()).count("\n") for each in handles.values()))
    figure = Figure(figsize=(_WIDTH, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, handle in handles.items():
        colour = handle.get_color()
        line = [point for point in points if point.curve == row]
        xs, ys = [point.tokens_per_query for point in line], [point.hit for point in line]
        axes.plot(xs, ys, handle.get_linestyle(), color=colour)
        if row in placed:
            x, y = placed[row]["tokens_per_query"], placed[row]["hit@1"]
            filled = handle.get_markerfacecolor()
            size = 11 if filled == "none" else 7  # a hollow marker stays visible around a filled one
            axes.plot([x], [y], str(handle.get_marker()), color=colour, markerfacecolor=filled, markersize=size)
    for score, label in (("tokens_per_query", axes.set_xlabel), ("hit@1", axes.set_ylabel)):
        label(f"{score}\n{SCORES[score].meaning}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.05, y=0.1)
    # Names are in the legend only: labels next to points of similar quality would overlap.
    figure.legend(
        handles=list(handles.values()),
        title=f"Quality against tokens, means over tasks. {_NOTE}",
        loc="outside upper left",
        fontsize=8,
        title_fontsize=8,
        alignment="left",
        frameon=False,
        handlelength=3,
        labelspacing=0.3,
    )
    return figure


def _handles(placed: Collection[str]) -> dict[str, Line2D]:
    """Row -> its entry of the legend, for every curve and every row that has a marker."""
    from matplotlib.lines import Line2D

    markers = cycle(_MARKERS)
    handles = {}
    for row in ordered({**dict.fromkeys(_LINES), **dict.fromkeys(placed)}):
        colour, style = _LINES.get(row, (_INK, ""))
        handles[row] = Line2D(
            [],
            [],
            color=colour,
            linestyle=style,
            marker=next(markers) if row in placed else "",
            markersize=6,
            # A row from before training, or before a phase, is hollow: it often coincides with the row from after it.
            markerfacecolor="none" if "before_" in row else colour,
            label=textwrap.fill(f"{row}: {row_meaning(row)}", _LEGEND_LETTERS),
        )
    return handles


def write_curves(folder: str | Path, results: EvaluationResults) -> list[Path]:
    """Writes ``quality_tokens.png`` and ``.csv``, each whole or not at all; nothing without curves."""
    figure = draw_curves(results)
    if figure is None:
        return []
    picture, table = Path(folder) / "quality_tokens.png", Path(folder) / "quality_tokens.csv"
    with whole_file(picture) as temporary:
        figure.savefig(temporary, format="png")
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["curve", "invocation_rate", "tokens_per_query", "hit@1"])
    for point in quality_curves(results.records):
        writer.writerow([point.curve, point.invocation_rate, point.tokens_per_query, point.hit])
    return [picture, write_text(table, rows.getvalue())]


def _gain(record: QueryRecord) -> float:
    return (record.reasoned_hit or 0.0) - record.direct_hit


def _sweep(curve: str, queries: Sequence[QueryRecord], steps: int) -> list[Point]:
    """The points at which the first 0 ... all queries reason; a query's weight is one over the size of its task."""
    sizes = Counter(record.task for record in queries)
    weight = {task: 1 / (size * len(sizes)) for task, size in sizes.items()}
    hit = sum(record.direct_hit * weight[record.task] for record in queries)
    rate = tokens = 0.0
    cuts = {round(step * len(queries) / steps) for step in range(1, steps + 1)}
    points = [Point(curve, 0.0, 0.0, hit)]
    for place, record in enumerate(queries, start=1):
        share = weight[record.task]
        hit, rate, tokens = hit + _gain(record) * share, rate + share, tokens + record.tokens * share
        if place in cuts:
            points.append(Point(curve, rate, tokens, hit))
    return points
