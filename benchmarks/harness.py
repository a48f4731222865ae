"""Shared code of the benchmarks: paired timing, peak memory, environment, and rows in `benchmarks/results/`.

Rivals are timed in turn within a repetition. They are compared by the median over repetitions of the ratio within one,
so a machine that slows down slows all of them. Times are CPU seconds of the process on a CPU, and seconds between
events on a GPU.

A script with more options calls `parser` for the shared ones, adds its own and parses. Other scripts call `arguments`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"

RUN = uuid.uuid4().hex[:12]
"""Identifies this process in every row: rows of one run were measured on one machine, one after another."""


def parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the options of every benchmark: ``smoke``, ``device``, ``repeats``, ``output``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--smoke", action="store_true", help="only test that it runs, with tiny sizes; the numbers mean nothing"
    )
    made.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure on (default: %(default)s)",
    )
    made.add_argument("--repeats", type=count, default=5, help="repetitions of every case (default: %(default)s)")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return made


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the shared options; see `parser`."""
    return parser(description).parse_args(argv)


def bar(description: str, total: int) -> tuple[Progress, Callable[[str], None]]:
    """A progress bar on standard error, and a function that advances it by one and shows what comes next.

    Enter the bar with ``with``.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    task = progress.add_task(description, total=total)
    return progress, lambda text: progress.update(task, advance=1, description=text)


def timed(function: Callable[[], object], *, device: str) -> float:
    """Measures the seconds of one call."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def paired(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, device: str, warm_up: bool = True
) -> dict[str, list[float]]:
    """Measures the seconds of every function in each repetition, by default after one call of each to warm up."""
    if warm_up:
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device=device))
    return times


def paired_clocks(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measures as `paired` does, and also the wall-clock seconds of the same calls, which include waiting.

    Wall-clock seconds are the right measure for a throughput.
    """
    waited: dict[str, list[float]] = {name: [] for name in functions}

    def clocked(name: str) -> Callable[[], object]:
        def call() -> None:
            start = time.perf_counter()
            functions[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            waited[name].append(time.perf_counter() - start)

        return call

    times = paired({name: clocked(name) for name in functions}, repeats=repeats, device=device)
    return times, {name: found[-repeats:] for name, found in waited.items()}  # the first call of each is the warm-up


def busy_seconds(seconds: float, *, device: str) -> float:
    """Converts a result of `timed` into the time if no thread ever waited: CPU seconds / threads."""
    return seconds / torch.get_num_threads() if device == "cpu" else seconds


def median_ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Median over repetitions of time / floor."""
    return statistics.median(mine / least for mine, least in zip(times, floor, strict=True))


def peak_megabytes(function: Callable[[], object], *, device: str) -> float:
    """Peak memory of the tensors that one call adds, including its result, in 10^6 bytes."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports every start and stop on standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    assert trace.profiler is not None
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def available_megabytes(device: str) -> float:
    """Free memory in 10^6 bytes; infinite if the system does not report it."""
    if device != "cpu":
        # Memory that torch's allocator keeps for its next tensors is free too.
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + kept) / 1e6
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1.024e-3 if kilobytes else float("inf")


def version(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions with which a row was measured."""
    return {
        "run": RUN,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": device,
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mmemb": version("mmemb"),
        "triton": version("triton"),
        "commit": _commit(),
    }


def append(rows: Sequence[Mapping[str, Any]], *, output: Path, name: str, smoke: bool, device: str) -> Path:
    """Appends rows, each with its `environment`, to ``<output>/<name>.jsonl``.

    A smoke run has a separate file.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}{'_smoke' if smoke else ''}.jsonl"
    around = environment(device)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **around}) + "\n" for row in rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a results file, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None) -> str:
    """Formats rows as aligned text, with numbers to three digits and ``-`` for None.

    Without ``columns`` the columns are those of the first row.
    """
    names = list(rows[0]) if columns is None else list(columns)
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def seconds(text: str) -> float:
    """A time above 0, for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} is not a time above 0")
    return value


def count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1; give 1 or more")
    return value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the checkout, with a ``+`` if files differ from it; ``unknown`` outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
