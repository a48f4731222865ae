"""Runs the main job with several seeds, for the mean and spread of the results of recipes/r1.yaml on the test split.

    python -m benchmarks.r1_seeds --seeds 1 2 3
    python -m benchmarks.r1_seeds --seeds 1 2 3 --at-once 3      one thread per run, three runs in parallel

Writes `benchmarks/results/r1_seeds.json`, the list of the runs' `summary.json`, and prints hit@1 by task as a ratio to
chance. A finished run is not repeated, and an interrupted run resumes. A run's folder is named by its seed and a digest
of its inputs, so that runs of different settings, weights or pools are never confused.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from mmemb.common.digests import bytes_digest, digest
from mmemb.common.files import write_text
from mmemb.common.vocabulary import ordered

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "r1.yaml"
_TINY = ROOT / "components" / "backbones" / "tiny"
SHIPPED = (
    _TINY / "model.safetensors",
    _TINY / "tokenizer.json",
    ROOT / "src" / "mmemb" / "data" / "bundled" / "pool.parquet",
)
"""Files with which a run begins, in addition to the recipe."""


def made_from(extra: Sequence[str]) -> str:
    """A digest of the recipe, the shipped files and the other words of the command. Files count by their content."""
    content = [RECIPE.read_bytes(), *(path.read_bytes() for path in SHIPPED if path.is_file())]
    content += [_content(word) for word in extra]
    return digest([bytes_digest(each) for each in content])


def _content(word: str) -> bytes:
    try:
        return Path(word).read_bytes() if Path(word).is_file() else word.encode()
    except OSError:  # the word is too long for a file name
        return word.encode()


def run(seed: int, *, folder: Path, at_once: int, extra: Sequence[str]) -> dict[str, Any]:
    """Trains one run unless it is finished; returns its summary, with ``runs_at_once`` among the settings.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    home = folder / f"seed_{seed}-{made_from(extra)}"
    summary = home / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "mmemb", "fit", "--config", str(RECIPE)]
        command += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        command += ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", home.name]
        command += ["--trainer.logger.version", "", *extra]
        last = home / "checkpoints" / "last.ckpt"
        if last.is_file():
            command += ["--ckpt_path", str(last)]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
        subprocess.run(command, check=True, env={**os.environ, **threads})
    found = json.loads(summary.read_text(encoding="utf-8"))
    found["settings"]["runs_at_once"] = at_once
    return found


def lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """hit@1 by task and row over the runs, and its ratio to chance."""
    found = []
    for name in ordered(summaries[0]["modes"]):
        for task in summaries[0]["modes"][name]["by_task"]:
            rows = [summary["modes"][name]["by_task"][task] for summary in summaries]
            mean = statistics.mean(row["hit@1"] for row in rows)
            found.append(f"{name:28} {task:12} hit@1 {mean:.3f}   {mean * rows[0]['candidates']:6.1f} x chance")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all seeds and writes the summaries. Unknown words of the command are passed to `mmemb fit`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--at-once", type=int, default=1, help="parallel runs; their times are then not comparable")
    parser.add_argument("--folder", type=Path, default=Path("runs/r1_seeds"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options, extra = parser.parse_known_args(argv)
    one = functools.partial(run, folder=options.folder, at_once=options.at_once, extra=extra)
    try:
        with ThreadPoolExecutor(options.at_once) as pool:
            summaries = list(pool.map(one, options.seeds))
    except subprocess.CalledProcessError as error:  # the run itself has printed the reason
        print(
            f"r1_seeds: a run ended with exit code {error.returncode}; run the same command again to continue",
            file=sys.stderr,
        )
        return 1
    write_text(options.output / "r1_seeds.json", json.dumps(summaries, indent=1) + "\n")
    print("\n".join(lines(summaries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
