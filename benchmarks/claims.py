"""Compares the time and memory of the loss in the kept results with their targets.

    python -m benchmarks.claims [results/infonce.jsonl]
    python -m benchmarks.claims --device Xeon         rows of one machine, since ratios differ between machines

Reads the rows that `benchmarks.infonce` wrote and measures nothing. The number of a case is from its newest row. Two
cases are compared within the newest run that has both, so on one device with the same number of threads. The exit
status is 1 if a measured number does not keep its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import harness
from benchmarks.harness import RESULTS, table

Key: TypeAlias = tuple[str, str, int, int, str, bool]
"""Backend, rival, N, D, dtype, and whether the loss is symmetric."""

Rows: TypeAlias = dict[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Results:
    """The measured rows of a results file.

    Attributes:
        newest: the newest row of each case.
        runs: the newest row of each case within a run, newest run first.
    """

    newest: Rows
    runs: Sequence[Rows]

    def ratio(self, above: Key, below: Key) -> float:
        """The ratio to the floor of one case divided by that of another, in the newest run that measured both.

        Raises:
            KeyError: no run measured both.
        """
        for rows in self.runs:
            if above in rows and below in rows:
                return rows[above]["ratio_to_floor"] / rows[below]["ratio_to_floor"]
        raise KeyError((above, below))


@dataclass(frozen=True)
class Claim:
    """A number and its bound.

    Attributes:
        text: the number in words.
        bound: its maximum or minimum; None if it only has to be measurable.
        least: whether the bound is a minimum; without effect if there is no bound.
        value: computes the number; raises KeyError if a row that it needs was not measured.
    """

    text: str
    bound: float | None
    least: bool
    value: Callable[[Results], float]

    def judge(self, results: Results) -> dict[str, Any]:
        """The claim as a row of a table."""
        try:
            measured = self.value(results)
        except KeyError:
            return {"claim": self.text, "asked": self._asked, "measured": "not measured yet", "holds": None}
        holds = self.bound is None or (measured >= self.bound if self.least else measured <= self.bound)
        return {"claim": self.text, "asked": self._asked, "measured": measured, "holds": "yes" if holds else "no"}

    @property
    def _asked(self) -> str:
        if self.bound is None:
            return "that it runs"
        return f"{'at least' if self.least else 'at most'} {self.bound:g}"


def _column(name: str, backend: str, n: int, width: int, dtype: str, symmetric: bool) -> Callable[[Results], float]:
    return lambda results: results.newest[backend, "mmemb", n, width, dtype, symmetric][name]


def _times(peer: str, backend: str, n: int, width: int, dtype: str, symmetric: bool) -> Callable[[Results], float]:
    """The time of a peer divided by ours, where both times are ratios to the floor of their own run."""
    case = (n, width, dtype, symmetric)
    return lambda results: results.ratio((backend, peer, *case), (backend, "mmemb", *case))


def _matmul_share(results: Results) -> float:
    # The loss needs four matrix products, and the floor computes three.
    return 4 / 3 / results.newest["cuda", "mmemb", 32768, 1024, "bfloat16", False]["ratio_to_floor"]


def _both_to_one(results: Results) -> float:
    case = ("cuda", "mmemb", 32768, 1024, "bfloat16")
    return results.ratio((*case, True), (*case, False))


def _fastest_peer(results: Results) -> float:
    """The lowest time of a peer divided by ours, over every case that a GPU run measured for both."""
    ratios = []
    for peer in results.newest:
        if peer[0] == "cuda" and peer[1] != "mmemb":
            with contextlib.suppress(KeyError):
                ratios.append(results.ratio(peer, (peer[0], "mmemb", *peer[2:])))
    if not ratios:
        raise KeyError("no run measured a peer and ours")
    return min(ratios)


SMALL, LARGE = ("cpu", 8192, 256, "float32"), ("cuda", 262144, 2048, "bfloat16")
CLAIMS = (
    *(
        Claim(
            f"CPU, one direction, {n} x {width} float32: time / floor",
            1.12,
            False,
            _column("ratio_to_floor", "cpu", n, width, "float32", False),
        )
        for n, width in ((8192, 256), (8192, 1024), (16384, 256))
    ),
    Claim("CPU, symmetric, 8192 x 256 float32: time / floor", 1.5, False, _column("ratio_to_floor", *SMALL, True)),
    Claim("CPU, one direction, 8192 x 256 float32: extra MB", 130, False, _column("extra_mb", *SMALL, False)),
    Claim("CPU, symmetric, 8192 x 256 float32: extra MB", 130, False, _column("extra_mb", *SMALL, True)),
    *(
        Claim(f"CPU, one direction, 8192 x 256 float32: {peer} / ours", bound, True, _times(peer, *SMALL, False))
        for peer, bound in (("sentence-transformers-32", 10), ("sentence-transformers-512", 2))
    ),
    Claim("GPU, one direction, 32768 x 1024 bfloat16: share of the matmul rate, 8U", 0.7, True, _matmul_share),
    Claim("GPU, 32768 x 1024 bfloat16: symmetric / one direction", 1.5, False, _both_to_one),
    Claim("GPU, every case measured with a peer: fastest peer / ours", 1, True, _fastest_peer),
    Claim(
        "GPU, one direction, 262144 x 2048 bfloat16 on one card: TFLOP/s", None, True, _column("tflops", *LARGE, False)
    ),
)


def read(path: Path, *, device: str = "") -> Results:
    """Reads the measured rows of one device from a results file.

    If no device has exactly this name, the rows of all devices whose names contain the text are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no row of such a device.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; python -m benchmarks.infonce writes it")
    newest: Rows = {}
    runs: dict[tuple[Any, ...], Rows] = {}
    every = harness.read(path)
    # An exact name selects only that device, even if another device's name begins with it.
    rows = [row for row in every if row["device"] == device] or [row for row in every if device in row["device"]]
    if every and not rows:
        known = ", ".join(sorted({row["device"] for row in every}))
        raise ValueError(f"--device {device}: {path} has rows of {known}")
    for row in rows:
        if row["seconds"] is None:
            continue
        key = (row["backend"], row["rival"], row["n"], row["width"], row["dtype"], row["symmetric"])
        # Older rows have no run name; their commit identifies the run.
        run = (row.get("run") or row["commit"], row["device"], row["threads"])
        newest[key] = row
        runs[run] = {**runs.pop(run, {}), key: row}
    return Results(newest, list(reversed(runs.values())))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the claims; returns 1 if a measured one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=RESULTS / "infonce.jsonl", help="rows (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="",
        metavar="TEXT",
        help="only rows of the device with this name or with this text in its name",
    )
    options = parser.parse_args(argv)
    try:
        results = read(options.results, device=options.device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    judged = [claim.judge(results) for claim in CLAIMS]
    print(table(judged))
    return int(any(row["holds"] == "no" for row in judged))


if __name__ == "__main__":
    sys.exit(main())
