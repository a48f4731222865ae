"""The picture of `benchmarks.infonce`: throughput and memory against N."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PANELS = {"tflops": "TFLOP/s", "extra_mb": "memory beyond the gradients, MB"}
"""Column of the rows -> label of the axis."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: Mapping[str, Any]) -> None:
    """Draws a column of panels a width and dtype, a line a rival: solid one direction, dashed symmetric.

    Args:
        rows: of `benchmarks.infonce`; those without a measurement are left out.
        path: a PNG, replaced whole.
        title: where it was measured: ``device``, ``commit``, ``torch``.
    """
    measured = [row for row in rows if row["tflops"] is not None]
    columns = sorted({(row["dtype"], row["width"]) for row in measured}, reverse=True) or [("nothing", 0)]
    colours = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(row["rival"] for row in measured))}
    figure = Figure(figsize=(1.5 + 3.6 * len(columns), 7), layout="constrained")
    axes = figure.subplots(len(PANELS), len(columns), sharex=True, squeeze=False)
    for column, (dtype, width) in enumerate(columns):
        axes[0][column].set_title(f"{dtype}, D = {width}")
        axes[-1][column].set_xlabel("N")
        for panel, (name, label) in enumerate(PANELS.items()):
            _lines(axes[panel][column], measured, dtype, width, name, colours)
            axes[panel][column].set_ylabel(label if column == 0 else "")
    if measured:
        marks = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
        figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize="small")
    where = f"{title['device']}, torch {title['torch']}, commit {title['commit']}"
    figure.suptitle(f"Loss and gradients; dashed: symmetric\n{where}", fontsize="medium")
    aside = path.with_name(path.name + ".part")
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, path)


def _lines(
    axis: Any, rows: Sequence[Mapping[str, Any]], dtype: str, width: int, name: str, colours: Mapping[str, str]
) -> None:
    for rival, colour in colours.items():
        for symmetric in (False, True):
            key = (rival, dtype, width, symmetric)
            points = sorted(
                (row["n"], row[name])
                for row in rows
                if (row["rival"], row["dtype"], row["width"], row["symmetric"]) == key
            )
            if points:
                style = "--" if symmetric else "-"
                axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
