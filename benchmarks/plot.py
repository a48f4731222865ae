"""Draws the picture of `benchmarks.infonce`, throughput and memory against N, from the kept rows.

python -m benchmarks.plot [results/infonce.jsonl] [--device NAME]
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.harness import RESULTS, read
from mmemb.common.files import whole_file

PANELS = {"tflops": "TFLOP/s", "extra_mb": "memory beyond the gradients, MB"}
"""Column of the rows -> label of the axis."""

CHARACTERS = 11
"""Characters of the title per inch of width."""


def newest(rows: Sequence[Mapping[str, Any]], *, device: str | None = None) -> list[Mapping[str, Any]]:
    """The newest measured row of each rival and case on a device; None for the device with the most such rows."""
    case = ("rival", "n", "width", "dtype", "symmetric")
    by_device: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    for row in rows:
        if row["tflops"] is not None and device in (None, row["device"]):
            by_device.setdefault(row["device"], {})[tuple(row[name] for name in case)] = row
    return list(max(by_device.values(), key=len, default={}).values())


def draw(results: Path, *, device: str | None = None) -> Path:
    """Draws one column of panels per width and dtype, with one line per rival.

    Solid lines are one direction. Dashed lines with hollow marks are symmetric.

    Args:
        results: file with rows of `benchmarks.infonce`, of which the `newest` are drawn.
        device: see `newest`.

    Returns:
        The path of a PNG next to the results, which is replaced as a whole.
    """
    path, measured = results.with_suffix(".png"), newest(read(results), device=device)
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
        figure.legend(handles=marks, loc="outside lower center", ncols=min(3, len(columns)), fontsize="small")
    where = [", ".join(dict.fromkeys(str(row[name]) for row in measured)) for name in ("device", "torch", "commit")]
    title = "{}, torch {}, commit {}".format(*where) if measured else "nothing measured"
    wrapped = textwrap.fill(title, int(CHARACTERS * figure.get_figwidth()))
    figure.suptitle(f"Loss and gradients; dashed, hollow: symmetric\n{wrapped}", fontsize="medium")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


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
                inside = "none" if symmetric else colour
                how = {"color": colour, "marker": "o", "markersize": 4, "markerfacecolor": inside}
                axis.plot(*zip(*points, strict=True), style, **how)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=RESULTS / "infonce.jsonl", help="rows (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="NAME", help="device of the rows (default: the device with the most rows)")
    options = parser.parse_args(argv)
    known = sorted({row["device"] for row in read(options.results)})
    if options.device not in (None, *known):
        parser.error(f"--device {options.device}: {options.results} has rows of {', '.join(known)}")
    print(f"drawn to {draw(options.results, device=options.device)}")


if __name__ == "__main__":
    main()
