"""Makes the README's picture and lines of results from `benchmarks/results/r1_seeds.json`.

    python -m tools.r1_headline        draws docs/images/quality_tokens.png again

The lines are a table of `tools.update_docs`. The picture contains a digest of its numbers, with which a test finds a
picture that is out of date.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmemb.common.digests import bytes_digest
from mmemb.common.files import whole_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "r1_seeds.json"
PICTURE = ROOT / "docs" / "images" / "quality_tokens.png"
SOURCE = "Source"
"""Key of the PNG's metadata that holds the digest."""

_LABELS = {
    "never": ("never: no query reasons", (8, -14), "#1c2733"),
    "always_reason": ("always_reason: all do", (-4, 10), "#1c2733"),
    "rl": ("rl: the model decides", (-8, 6), "#b3402f"),
    "threshold": ("threshold: reason where unsure", (-8, -17), "#3f5fb5"),
    "oracle": ("oracle: hindsight decides", (8, 5), "#2e7d5b"),
}
"""Mode -> its label, the label's distance in points (to the left where negative) and its colour."""

_AXES = "tokens_per_query", "hit@1"
Summary = dict[str, Any]


def digest(results: Path) -> str:
    """SHA-256 of the numbers that the picture shows."""
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    shown = {mode: [[summary["modes"][mode][key] for key in _AXES] for summary in summaries] for mode in _LABELS}
    return bytes_digest(json.dumps(shown).encode())


def _mean(summaries: Sequence[Summary], mode: str, key: str) -> float:
    """Mean over the runs of a score of a mode."""
    return statistics.mean(summary["modes"][mode][key] for summary in summaries)


def _above_random_routing(summary: Summary) -> float:
    """hit@1 of a run's learned decision minus that of random routing with as many tokens per query."""
    (direct, start), (reasoned, end), (learned, spent) = (
        (summary["modes"][mode]["hit@1"], summary["modes"][mode]["tokens_per_query"])
        for mode in ("never", "always_reason", "rl")
    )
    share = (spent - start) / (end - start)
    return float(learned - direct - share * (reasoned - direct))


def lines(results: Path) -> str:
    """A Markdown list of hit@1 on each path and the tokens that the learned decision saves.

    Without results, one sentence says so.

    Args:
        results: a JSON list with the `summary.json` of each run.
    """
    if not results.exists():
        return "No results are kept yet."
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    direct, reasoned, learned, oracle = (
        _mean(summaries, mode, "hit@1") for mode in ("never", "always_reason", "rl", "oracle")
    )
    share = _mean(summaries, "rl", "tokens_per_query") / _mean(summaries, "always_reason", "tokens_per_query")
    above = statistics.mean(map(_above_random_routing, summaries))
    return "\n".join(
        (
            f"- `never` (no query reasons): hit@1 {direct:.3f}, mean over eight tasks and {len(summaries)} seeds.",
            f"- `always_reason` (every query reasons): {reasoned:.3f}.",
            f"- `rl` (the model decides), limited to about {share:.0%} of those tokens: {learned:.3f}. "
            f"That is {above:.3f} more than random routing at equal cost.",
            f"- `oracle` (decided in hindsight, an upper bound): {oracle:.3f}.",
        )
    )


def draw(results: Path = RESULTS, picture: Path = PICTURE) -> Path:
    """Draws hit@1 against rationale tokens per query, one point per mode with its spread over seeds.

    Returns the path of the PNG.
    """
    summaries: list[Summary] = json.loads(results.read_text(encoding="utf-8"))
    figure = Figure(figsize=(7.5, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [[_mean(summaries, mode, key) for mode in ("never", "always_reason")] for key in _AXES]
    axes.plot(*ends, "--", color="#66727f", linewidth=1, label="random routing")
    for mode, (label, shift, colour) in _LABELS.items():
        x, y = (_mean(summaries, mode, key) for key in _AXES)
        over = [[summary["modes"][mode][key] for summary in summaries] for key in _AXES]
        xerr, yerr = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in over)
        axes.errorbar([x], [y], xerr=xerr, yerr=yerr, fmt="o", color=colour, markersize=7, capsize=2, linewidth=1)
        side = "left" if shift[0] > 0 else "right"
        axes.annotate(label, (x, y), xytext=shift, textcoords="offset points", color=colour, ha=side)
    axes.set_xlabel("rationale tokens per query")
    axes.set_ylabel("hit@1, mean over tasks")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=0.15)
    axes.legend(frameon=False, loc="lower right")
    with whole_file(picture) as temporary:
        figure.savefig(temporary, format="png", metadata={SOURCE: digest(results)})
    return picture


if __name__ == "__main__":
    print(draw().relative_to(ROOT))
    sys.exit()
