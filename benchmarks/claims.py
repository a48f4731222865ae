"""What is asked of the loss in time and memory, beside what the kept results say.

    python -m benchmarks.claims [results/infonce.jsonl]

Reads the newest row of every case that `benchmarks.infonce` wrote; measures nothing. Ends with status 1 if a bound that
was measured does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.harness import RESULTS, table

Key: TypeAlias = tuple[str, str, int, int, str, bool]
Rows: TypeAlias = Mapping[Key, Mapping[str, Any]]
"""By backend, rival, N, D, dtype and whether both directions; measured rows only."""


@dataclass(frozen=True)
class Claim:
    """A number and its bound.

    Attributes:
        text: what the number is.
        bound: the most it may be, or the least.
        least: the bound is the least.
        value: the number; raises KeyError where a row it needs was not measured.
    """

    text: str
    bound: float
    least: bool
    value: Callable[[Rows], float]

    def judge(self, rows: Rows) -> dict[str, Any]:
        """The claim as a row of a table."""
        try:
            measured = self.value(rows)
        except KeyError:
            return {"claim": self.text, "asked": self._asked, "measured": "not measured yet", "holds": None}
        holds = measured >= self.bound if self.least else measured <= self.bound
        return {"claim": self.text, "asked": self._asked, "measured": measured, "holds": "yes" if holds else "no"}

    @property
    def _asked(self) -> str:
        return f"{'at least' if self.least else 'at most'} {self.bound:g}"


def _column(name: str, backend: str, n: int, width: int, dtype: str, symmetric: bool) -> Callable[[Rows], float]:
    return lambda rows: rows[backend, "mmemb", n, width, dtype, symmetric][name]


def _times(peer: str, backend: str, n: int, width: int, dtype: str, symmetric: bool) -> Callable[[Rows], float]:
    """How many times our time a peer takes, both by their ratio to the floor beside them."""

    def value(rows: Rows) -> float:
        theirs, ours = (rows[backend, name, n, width, dtype, symmetric]["ratio_to_floor"] for name in (peer, "mmemb"))
        return theirs / ours

    return value


def _matmul_share(rows: Rows) -> float:
    # Four products are counted, the floor beside it makes three.
    return 4 / 3 / rows["cuda", "mmemb", 32768, 1024, "bfloat16", False]["ratio_to_floor"]


def _both_to_one(rows: Rows) -> float:
    one, both = (rows["cuda", "mmemb", 32768, 1024, "bfloat16", way]["ratio_to_floor"] for way in (False, True))
    return both / one


def _fastest_peer(rows: Rows) -> float:
    case = (32768, 1024, "bfloat16", False)
    ours = rows["cuda", "mmemb", *case]["ratio_to_floor"]
    peers = [row["ratio_to_floor"] for key, row in rows.items() if key[0] == "cuda" and key[2:] == case]
    others = sorted(peers)
    others.remove(ours)
    if not others:
        raise KeyError("no peer was measured")
    return others[0] / ours


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
    Claim("GPU, one direction, 32768 x 1024 bfloat16: fastest peer / ours", 1, True, _fastest_peer),
    Claim("GPU, one direction, 262144 x 2048 bfloat16: TFLOP/s", 0, True, _column("tflops", *LARGE, False)),
)


def read(path: Path) -> Rows:
    """The newest measured row of every case of a results file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; python -m benchmarks.infonce writes it")
    rows: dict[Key, Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["seconds"] is not None:
            key = (row["backend"], row["rival"], row["n"], row["width"], row["dtype"], row["symmetric"])
            rows[key] = row
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the claims; 1 if a measured one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=RESULTS / "infonce.jsonl", help="rows (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        rows = read(options.results)
    except FileNotFoundError as error:
        parser.error(str(error))
    judged = [claim.judge(rows) for claim in CLAIMS]
    print(table(judged))
    return int(any(row["holds"] == "no" for row in judged))


if __name__ == "__main__":
    sys.exit(main())
