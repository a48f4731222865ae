"""What every benchmark shares: paired timing, peak memory, where it ran, and rows appended to `benchmarks/results/`.

Rivals are timed in turn within a repetition and compared by the median of the ratios of one repetition, so that a
machine that slows down slows all of them. Times are CPU seconds of the process on a CPU, seconds between events
on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of every benchmark: ``smoke``, ``device``, ``repeats``, ``output``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that it runs; its numbers mean nothing"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of every case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def timed(function: Callable[[], object], *, device: str) -> float:
    """Seconds of one call."""
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


def paired(functions: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every function in each repetition, after one call of each to warm up."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function, device=device))
    return times


def median_ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Median over repetitions of time / floor."""
    return statistics.median(mine / least for mine, least in zip(times, floor, strict=True))


def peak_megabytes(function: Callable[[], object], *, device: str) -> float:
    """Most memory in tensors that one call holds beyond what there was, its result included, in 10^6 bytes."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    assert trace.profiler is not None
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def environment(device: str) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def append(rows: Sequence[Mapping[str, Any]], *, output: Path, name: str, smoke: bool, device: str) -> Path:
    """Appends rows, each with its `environment`, to ``<output>/<name>.jsonl``; a smoke run's to a file of its own."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}{'_smoke' if smoke else ''}.jsonl"
    around = environment(device)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **around}) + "\n" for row in rows)
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text, numbers to three digits."""
    names = list(rows[0])
    cells = [names] + [[f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the checkout, ``+`` if files differ from it; ``unknown`` outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
