"""Measures an optimiser step of the tiny model: gradient cache, plain backward, sentence-transformers' cached loss.

    python -m benchmarks.gradcache                                       global batches 64 ... 8192 in chunks of 32 rows
    python -m benchmarks.gradcache --batches 256 --ways mmemb plain --budget 2000

Every method and batch is measured in a separate process, which may take --budget MB. One that does not fit is reported
as a row and does not crash the benchmark. Within the process the step takes turns with a floor. The floor runs every
row forward and backward once, each chunk with its own loss, and makes one optimiser step. The cache encodes all chunks
but one twice. That is 4/3 of the floor if a backward pass costs two forward passes. `mmemb-kept` keeps every chunk's
graph and encodes once. Prints the rows and appends them to `gradcache.jsonl`; docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.peers import INSTALL
from benchmarks.steps import WAYS, Task, measure

BATCHES = (64, 256, 1024, 4096, 8192)
EMPTY: dict[str, Any] = dict.fromkeys(
    ("seconds", "floor_seconds", "ratio_to_floor", "peak_mb", "error", "repeats", "note")
)
DISTRIBUTION = {"sentence-transformers": "sentence-transformers"}
"""The distribution that a method needs, whose version its rows show."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = harness.parser(str(__doc__))
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help=f"pairs per step (default: {BATCHES})")
    parser.add_argument(
        "--chunk", type=harness.count, help="queries or targets per backward pass (default: 32; smoke: 4)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument(
        "--budget", type=float, default=4000.0, metavar="MB", help="maximum memory of a step (default: %(default)g)"
    )
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="time for the repetitions of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=harness.seconds,
        default=300.0,
        help="maximum time of a process in seconds (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    options.chunk = options.chunk or (4 if options.smoke else 32)
    options.batches = options.batches or ([2 * options.chunk] if options.smoke else list(BATCHES))
    wrong = [batch for batch in options.batches if batch < 1 or batch % options.chunk]
    if wrong:
        parser.error(
            f"--batches {wrong} with --chunk {options.chunk}: a batch must be a positive multiple of the chunk"
        )
    return options


def in_a_process(task: Task, *, limit: float) -> dict[str, Any]:
    """Runs `measure` in a separate process; returns a note instead of results if it ends early.

    Raises:
        RuntimeError: our own method failed for another reason than memory or time.
    """
    command = [sys.executable, "-m", "benchmarks.steps", json.dumps(dataclasses.asdict(task))]
    return outcome(command, limit=limit, must_work=task.way.startswith("mmemb"))


def outcome(command: Sequence[str], *, limit: float, must_work: bool) -> dict[str, Any]:
    """Runs a command; returns the JSON object that it prints last, or a note that says how it ended."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"note": f"took more than {limit:g} s (--limit)"}
    if done.returncode == -signal.SIGKILL or (done.returncode < 0 and not must_work):
        return {"note": f"ended by {signal.Signals(-done.returncode).name}, probably out of memory"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        if must_work:
            raise RuntimeError(f"{command[:3]} failed:\n{done.stderr[-4000:]}")
        return {"note": last[:160]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def row(way: str, batch: int, chunk: int, found: dict[str, Any]) -> dict[str, Any]:
    """Makes one row of the results."""
    version = harness.version(DISTRIBUTION.get(way, "torch"))
    return {"rival": way, "version": version, "batch": batch, "chunk": chunk, **EMPTY, **found}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all batches; prints the rows after each batch and appends them to ``gradcache.jsonl``."""
    options = parse(argv)
    # A smoke run stays in this process, since three more processes would load torch three times.
    run: Callable[[Task], dict[str, Any]] = (
        measure if options.smoke else lambda task: in_a_process(task, limit=options.limit)
    )
    ended: dict[str, str] = {}
    progress, advance = harness.bar("gradcache", len(options.batches) * len(options.ways))
    with progress:
        for batch in sorted(options.batches):
            rows = []
            for way in options.ways:
                if harness.version(DISTRIBUTION.get(way, "torch")) is None:
                    found: dict[str, Any] = {"note": INSTALL}
                elif way in ended:
                    found = {"note": f"not tried: {ended[way]}"}
                else:
                    found = run(
                        Task(
                            way=way,
                            batch=batch,
                            chunk=options.chunk,
                            device=options.device,
                            repeats=options.repeats,
                            seconds=0.0 if options.smoke else options.seconds,
                            budget_mb=None if options.smoke else options.budget,
                        )
                    )
                    if found.get("note"):
                        ended[way] = f"{batch} pairs: {found['note']}"
                rows.append(row(way, batch, options.chunk, found))
                advance(f"batch {batch}, {way}")
            path = harness.append(
                rows, output=options.output, name="gradcache", smoke=options.smoke, device=options.device
            )
            columns = [name for name in rows[0] if name != "version"]
            print("", harness.table(rows, columns=columns), sep="\n", flush=True)
    print(f"appended to {path}")


if __name__ == "__main__":
    main()
