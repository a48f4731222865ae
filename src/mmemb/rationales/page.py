"""Writes the statistics of a pool as an HTML page: a table, and a histogram of gains per task.

The page is one file that needs no other. The histograms are inline SVG.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmemb.common.files import write_text
from mmemb.rationales.stats import ALL, GroupStats

COLUMNS = ("task", "worker", "candidates", "keep rate", "mean gain", "placebo share", "leaks", "tokens")
LEGEND = (
    "keep rate: share of candidates whose gain over no rationale exceeds the margin. mean gain: in nats. placebo "
    "share: among the kept candidates, the share whose placebo (another pair's rationale) gains at least as much. "
    "leaks: candidates that contain the target; only the column 'candidates' counts them too. tokens: mean length, "
    "where known."
)
_COLOURS = ("#3f5fb5", "#2e7d5b", "#b3402f", "#8a6d3b", "#6b4c9a")
_PLACEBO = "#66727f"
_BINS = 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #f4f6f8; margin: 2rem auto; max-width: 62rem }
h1 { font-size: 1.4rem } dt { float: left; clear: left; width: 9rem; color: #66727f } dd { margin-left: 9rem }
table { border-collapse: collapse; background: #fff } th, td { padding: .3rem .8rem; text-align: right }
th { color: #66727f; font-weight: normal; border-bottom: 1px solid #d9dfe5 } .sum td { border-top: 1px solid #d9dfe5 }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
figure { display: inline-block; margin: .6rem .6rem 0 0; background: #fff } p { color: #66727f }
"""


def cells(group: GroupStats) -> tuple[str, ...]:
    """Returns the numbers of a group as text, in the order of `COLUMNS`; ``-`` for a missing number."""
    return (
        group.task,
        group.worker,
        str(group.candidates),
        _text(group.keep_rate, ".1%"),
        _text(group.mean_gain, "+.3f"),
        _text(group.placebo_share, ".1%"),
        str(group.leaks),
        _text(group.mean_tokens, ".1f"),
    )


def write_page(path: str | Path, groups: Sequence[GroupStats], facts: Mapping[str, str], *, margin: float) -> Path:
    """Writes the page, whole or not at all. Makes the folder if necessary.

    Args:
        path: the HTML file.
        groups: the result of `mmemb.rationales.stats.pool_stats`.
        facts: facts about the pool, name -> value, listed above the table.
        margin: the gain marked in the histograms, in nats.

    Returns:
        The path of the page.
    """
    rows = "\n".join(
        f"<tr{' class=sum' if group.task == ALL else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(group))
        + "</tr>"
        for group in groups
    )
    tasks = list(dict.fromkeys(group.task for group in groups))
    drawn = [(task, [group for group in groups if group.task == task and len(group.gains)]) for task in tasks]
    figures = "\n".join(f"<figure>{_histogram(task, some, margin)}</figure>" for task, some in drawn if some)
    listing = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Rationale pool</title><style>{_STYLE}</style></head><body>
<h1>Rationale pool</h1>
<dl>{listing}</dl>
<table><tr>{"".join(f"<th>{name}</th>" for name in COLUMNS)}</tr>
{rows}
</table>
<p>{html.escape(LEGEND)}</p>
{figures or "<p>No candidate has been scored yet.</p>"}
</body></html>
"""
    return write_text(path, page)


def _histogram(task: str, groups: Sequence[GroupStats], margin: float) -> str:
    """Returns an SVG element with the gains by worker, and the gains of the placebos as an outline."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    values = [np.asarray(group.gains) for group in groups]
    placebos = np.concatenate([np.asarray(group.placebos) for group in groups])
    every = np.concatenate([*values, placebos])
    every = every[np.isfinite(every)]
    low, high = np.percentile(every, [0.5, 99.5]) if len(every) else (-1.0, 1.0)
    edges = np.linspace(min(low, margin), max(high, margin) + 1e-6, _BINS + 1).tolist()
    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    clipped = [np.clip(value[np.isfinite(value)], edges[0], edges[-1]) for value in values]
    names = [group.worker or "?" for group in groups]
    axes.hist(clipped, edges, stacked=True, label=names, color=[_COLOURS[i % len(_COLOURS)] for i in range(len(names))])
    finite = placebos[np.isfinite(placebos)]
    if len(finite):
        outline = np.clip(finite, edges[0], edges[-1])
        axes.hist(outline, edges, histtype="step", color=_PLACEBO, linewidth=1.2, label="placebo")
    axes.axvline(margin, color="#1c2733", linewidth=0.8, linestyle="--")
    axes.set_title(task, fontsize=10)
    axes.set_xlabel("gain over no rationale (nats)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Fixed ids and no date, so that the same pool gives the same page.
    with rc_context({"svg.hashsalt": f"mmemb {task}"}):
        FigureCanvasSVG(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _text(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"
