"""Compares the InfoNCE loss and its gradients, for N queries and N candidates of width D, with bare matrix products.

    python -m benchmarks.infonce                            the official run of this device
    python -m benchmarks.infonce --full                     every N in 2k ... 64k and every D in 256, 1024, 2048
    python -m benchmarks.infonce --cases 8192x256 --dtypes float32 --rivals mmemb naive

Each rival takes turns with the floor: the three matrix products S, dQ and dK, in stripes, into existing buffers. The
symmetric loss needs a fourth product and is compared with the same floor. Prints one row per rival and case, appends
them to `infonce.jsonl`, and draws `infonce.png` from the newest rows of this device. docs/benchmarks.md explains the
columns.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness, peers
from benchmarks.peers import RIVALS, Rival
from benchmarks.plot import draw
from mmemb.kernels import release_workspace

FLOOR_ROWS = {"cpu": 2048, "cuda": 4096}
"""Rows per stripe of the floor; on two cores 2048 was the fastest of 256 ... 8192 at 8192 x 256."""

CHECKED = 1024
"""Maximum number of rows on which a rival's error is measured, since the float64 reference keeps whole matrices."""

SIZES, WIDTHS = (2048, 4096, 8192, 16384, 32768, 65536), (256, 1024, 2048)
CASES = {
    "cpu": "2048x256 8192x256 8192x1024 16384x256",
    "cuda": "2048x256 8192x256 8192x1024 32768x1024 65536x2048 262144x2048",
}
SMOKE = "64x16"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ("rival", "seconds", "ratio_to_floor", "tflops", "extra_mb", "error", "repeats", "note")


@dataclass(frozen=True)
class Case:
    """N queries and candidates of width D, one dtype, one or both directions."""

    n: int
    width: int
    dtype: str
    symmetric: bool

    def __str__(self) -> str:
        return f"{self.n} x {self.width} {self.dtype} {'symmetric' if self.symmetric else 'one direction'}"

    @property
    def work(self) -> int:
        """The amount of work, to which the time is proportional."""
        return self.n * self.n * self.width

    def embeddings(self, device: str) -> tuple[Tensor, Tensor]:
        """Query and candidate embeddings [N, D] of unit length, drawn from a seed."""
        query, candidate = _unit_rows(self.n, self.width).to(device, DTYPES[self.dtype], copy=True)
        return query, candidate


@functools.lru_cache(maxsize=1)
def _unit_rows(n: int, width: int) -> Tensor:
    """Unit rows [2, N, D] on the CPU, kept for the next rivals, since drawing many rows takes longer than a call."""
    return normalize(torch.randn((2, n, width), generator=torch.Generator().manual_seed(0)), dim=2)


def floor(query: Tensor, candidate: Tensor, *, rows: int) -> Callable[[], None]:
    """Makes a function that computes only the three products."""
    rows = min(rows, len(query))
    logits = query.new_empty(rows, len(candidate))
    query_grad, candidate_grad = torch.empty_like(query), torch.zeros_like(candidate)

    def run() -> None:
        for start in range(0, len(query), rows):
            stripe = query[start : start + rows]
            part = torch.mm(stripe, candidate.T, out=logits[: len(stripe)])
            torch.mm(part, candidate, out=query_grad[start : start + rows])
            candidate_grad.addmm_(part.T, stripe)

    return run


class Course:
    """Measures case after case, and skips cases that would take a rival too long by its earlier times.

    Args:
        device: ``cpu`` or ``cuda``.
        repeats: maximum number of repetitions of a case.
        seconds: time for the repetitions of one rival in one case; at least two are made.
        limit: maximum time of a call in seconds; a call that would take longer is not made.
    """

    def __init__(self, *, device: str, repeats: int, seconds: float, limit: float) -> None:
        self.device, self.repeats, self.seconds, self.limit = device, repeats, seconds, limit
        self._seen: dict[tuple[str, str, bool], float] = {}

    def measure(self, rival: Rival, case: Case) -> dict[str, Any]:
        """Measures one row; if it cannot be measured, its note says why."""
        row = empty_row(rival, case)
        if reason := self._refusal(rival, case):
            return {**row, "note": reason}
        try:
            return {**row, **self._measured(rival, case)}
        except Exception as failure:
            # A failure of another project is a result; a failure of ours is a bug.
            if rival.name == "mmemb":
                raise
            message = (str(failure).splitlines() or [""])[0][:160]
            return {**row, "note": f"{type(failure).__name__}: {message}"}

    def _refusal(self, rival: Rival, case: Case) -> str | None:
        if not rival.installed:
            return peers.INSTALL
        if rival.cuda and self.device == "cpu":
            return "needs a GPU"
        if case.symmetric and not rival.both:
            return "one direction only"
        megabytes = rival.matrices * case.n**2 * DTYPES[case.dtype].itemsize / 1e6
        free = harness.available_megabytes(self.device)
        if megabytes > free:
            return f"needs more than {megabytes:.0f} MB, {free:.0f} MB are free"
        pace = self._seen.get((rival.name, case.dtype, case.symmetric))
        if pace is not None and pace * case.work > self.limit:
            return f"would take about {pace * case.work:.0f} s per call (--limit {self.limit:g})"
        return None

    def _measured(self, rival: Rival, case: Case) -> dict[str, Any]:
        query, candidate = case.embeddings(self.device)
        error = peers.error(rival, query[:CHECKED], candidate[:CHECKED], symmetric=case.symmetric)
        call = rival.make(query, candidate, case.symmetric)
        gradients = (query.nbytes + candidate.nbytes) / 1e6
        # The first call at this size is the warm-up and shows the memory. The second shows the pace.
        release_workspace()
        extra = harness.peak_megabytes(call, device=self.device) - gradients
        products = floor(query, candidate, rows=FLOOR_ROWS[self.device])
        first = {name: harness.timed(run, device=self.device) for name, run in (("floor", products), ("rival", call))}
        busy = {name: harness.busy_seconds(value, device=self.device) for name, value in first.items()}
        self._seen[rival.name, case.dtype, case.symmetric] = busy["rival"] / case.work
        repeats = max(2, min(self.repeats, int(self.seconds / sum(busy.values()))))
        times = harness.paired({"floor": products, "rival": call}, repeats=repeats, device=self.device, warm_up=False)
        seconds = statistics.median(times["rival"])
        products_needed = 4 if case.symmetric else 3
        operations = 2 * products_needed * case.work
        return {
            "version": harness.version(rival.distribution or "torch"),
            "seconds": seconds,
            "floor_seconds": statistics.median(times["floor"]),
            "ratio_to_floor": harness.median_ratio(times["rival"], times["floor"]),
            "tflops": operations / harness.busy_seconds(seconds, device=self.device) / 1e12,
            "extra_mb": extra,
            "error": error,
            "repeats": repeats,
        }


def empty_row(rival: Rival, case: Case) -> dict[str, Any]:
    """The row of a case before anything is measured."""
    return {
        "rival": rival.name,
        "version": None,
        "n": case.n,
        "width": case.width,
        "dtype": case.dtype,
        "symmetric": case.symmetric,
        "seconds": None,
        "floor_seconds": None,
        "ratio_to_floor": None,
        "tflops": None,
        "extra_mb": None,
        "error": None,
        "repeats": None,
        "note": None,
    }


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options select, smaller sizes first."""
    sizes = list(itertools.product(SIZES, WIDTHS)) if options.full else options.cases
    if sizes is None:
        sizes = [size(text) for text in (SMOKE if options.smoke else CASES[options.device]).split()]
    ways = [way == "symmetric" for way in options.directions]
    sizes = sorted(sizes, key=lambda pair: pair[0] ** 2 * pair[1])
    return [Case(n, width, dtype, both) for (n, width), dtype, both in itertools.product(sizes, options.dtypes, ways)]


def size(text: str) -> tuple[int, int]:
    """Reads ``8192x256`` as (8192, 256), for argparse."""
    n, _, width = text.partition("x")
    if not (n.isdecimal() and width.isdecimal() and int(n) > 1 and int(width) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a case; give NxD, such as 8192x256")
    return int(n), int(width)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = harness.parser(str(__doc__))
    names = [rival.name for rival in RIVALS]
    parser.add_argument("--cases", type=size, nargs="+", metavar="NxD", help=f"sizes (default: {CASES})")
    parser.add_argument(
        "--full", action="store_true", help=f"every N in {SIZES} with every D in {WIDTHS}; hours on CPU"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: both")
    ways = ["one", "symmetric"]
    parser.add_argument("--directions", nargs="+", choices=ways, default=ways, help="default: both")
    parser.add_argument("--rivals", nargs="+", choices=names, help="rivals (default: all that run on the device)")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="time for the repetitions of a row (default: %(default)s)"
    )
    parser.add_argument("--limit", type=harness.seconds, help="maximum seconds per call (default: 8; with --full 60)")
    options = parser.parse_args(argv)
    if options.full and options.cases:
        parser.error("--full and --cases exclude each other; give only one of them")
    options.limit = options.limit or (60.0 if options.full else 8.0)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases; prints the rows after each case, appends them to ``infonce.jsonl``, and draws the picture."""
    options = parse(argv)
    suit = [rival.name for rival in RIVALS if options.device != "cpu" or not rival.cuda]
    rivals = [rival for rival in RIVALS if rival.name in (options.rivals or suit)]
    wanted = cases(options)
    course = Course(
        device=options.device,
        repeats=options.repeats,
        seconds=0.0 if options.smoke else options.seconds,
        limit=options.limit,
    )
    progress, advance = harness.bar("infonce", len(wanted) * len(rivals))
    with progress:
        for case in wanted:
            found = []
            for rival in rivals:
                found.append(course.measure(rival, case))
                advance(f"{case}, {rival.name}")
            path = harness.append(
                found, output=options.output, name="infonce", smoke=options.smoke, device=options.device
            )
            print(f"\n{case}", harness.table(found, columns=COLUMNS), sep="\n", flush=True)
    drawn = draw(path, device=harness.read(path)[-1]["device"])
    print(f"appended to {path}", f"drawn to {drawn}", sep="\n")


if __name__ == "__main__":
    main()
