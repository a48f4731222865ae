"""Quality against tokens: what thinking about ever more queries buys.

A controller is a point; a dial is a curve. The curves are drawn from the records of one evaluation, without running the
model: queries are sorted by a signal, and the first share of them takes the reasoned path.

- ``rl``: those the model most leans to think about first (what the learned controller does as its offset rises);
- ``threshold``: least confident first (what the threshold controller does as its threshold rises);
- ``oracle``: largest gain of hit@1 a token first, the upper bound (it knows the answers);
- ``random``: the straight line between never and always, the expectation of a coin.

Every task counts once, as in the summary.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from mmemb.common.files import whole_file, write_text
from mmemb.types import EvaluationResults, QueryRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {
    "rl": ("#b3402f", "-"),
    "threshold": ("#3f5fb5", "-"),
    "oracle": ("#2e7d5b", "-"),
    "random": ("#66727f", "--"),
}


@dataclass(frozen=True)
class Point:
    """A place on a curve.

    Attributes:
        curve: which curve.
        think_rate: share of queries thought about, tasks counting once.
        tokens_per_query: rationale tokens a query, tasks counting once.
        hit: hit@1, tasks counting once.
    """

    curve: str
    think_rate: float
    tokens_per_query: float
    hit: float


def quality_curves(records: Sequence[QueryRecord], *, steps: int = 50) -> list[Point]:
    """The curves, each from thinking about nobody to everybody.

    Args:
        records: one a query. No curves unless the reasoned path of all is known: of some they would not compare with
            the modes, which are of all.
        steps: points a curve, besides its start.
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
    coin = [Point("random", end.think_rate, end.tokens_per_query, end.hit) for end in ends]
    return [point for curve in curves.values() for point in curve] + coin


def draw_curves(results: EvaluationResults) -> Figure | None:
    """The curves with every mode as a point; None unless all queries were thought about by some mode."""
    points = quality_curves(results.records)
    if not points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve, (colour, style) in _STYLES.items():
        line = [point for point in points if point.curve == curve]
        xs, ys = [point.tokens_per_query for point in line], [point.hit for point in line]
        axes.plot(xs, ys, style, color=colour, label=f"{curve} (swept)" if curve != "random" else "a coin")
    placed = {mode: scores for mode, scores in results.modes.items() if "tokens_per_query" in scores}
    # Named in the legend: labels beside points of like quality would lie over each other.
    for (mode, scores), marker in zip(placed.items(), cycle("os^DvPX*<>"), strict=False):
        x, y = scores["tokens_per_query"], scores["hit@1"]
        axes.plot([x], [y], marker, color="#1c2733", markersize=6, label=mode.replace("_", " "))
    axes.set_xlabel("rationale tokens a query")
    axes.set_ylabel("hit@1, mean over tasks")
    axes.set_title("quality against tokens", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14, y=0.1)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


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
    writer.writerow(["curve", "think_rate", "tokens_per_query", "hit@1"])
    for point in quality_curves(results.records):
        writer.writerow([point.curve, point.think_rate, point.tokens_per_query, point.hit])
    return [picture, write_text(table, rows.getvalue())]


def _gain(record: QueryRecord) -> float:
    return (record.reasoned_hit or 0.0) - record.direct_hit


def _sweep(curve: str, ordered: Sequence[QueryRecord], steps: int) -> list[Point]:
    """Lets the first 0 ... all queries think; each query weighs one over its task's size."""
    sizes = Counter(record.task for record in ordered)
    weight = {task: 1 / (size * len(sizes)) for task, size in sizes.items()}
    hit = sum(record.direct_hit * weight[record.task] for record in ordered)
    rate = tokens = 0.0
    cuts = {round(step * len(ordered) / steps) for step in range(1, steps + 1)}
    points = [Point(curve, 0.0, 0.0, hit)]
    for place, record in enumerate(ordered, start=1):
        share = weight[record.task]
        hit, rate, tokens = hit + _gain(record) * share, rate + share, tokens + record.tokens * share
        if place in cuts:
            points.append(Point(curve, rate, tokens, hit))
    return points
