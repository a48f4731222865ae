"""The main job under several seeds: what recipes/r1.yaml reaches on the test split, mean and spread.

    python -m benchmarks.r1_seeds --seeds 1 2 3

Writes `benchmarks/results/r1_seeds.json`, the list of the runs' `summary.json`, and prints hit@1 by task as a ratio to
chance. A seed whose run is finished is not run again; one that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "r1.yaml"


def run(seed: int, folder: Path, extra: Sequence[str]) -> dict[str, Any]:
    """One run, or what it left if it is finished; returns its summary.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    home = folder / f"seed_{seed}"
    summary = home / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "mmemb", "fit", "--config", str(RECIPE)]
        command += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        command += ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", home.name]
        command += ["--trainer.logger.version", "", *extra]
        last = home / "checkpoints" / "last.ckpt"
        if last.is_file():
            command += ["--ckpt_path", str(last)]
        subprocess.run(command, check=True)
    return json.loads(summary.read_text(encoding="utf-8"))


def lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """hit@1 by task and mode over the runs, and how many times chance that is."""
    found = []
    for mode, scores in summaries[0]["modes"].items():
        for task in scores["by_task"]:
            rows = [summary["modes"][mode]["by_task"][task] for summary in summaries]
            mean = statistics.mean(row["hit@1"] for row in rows)
            found.append(f"{mode:16} {task:12} hit@1 {mean:.3f}   {mean * rows[0]['candidates']:6.1f} x chance")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; words it does not know go to `mmemb fit`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/r1_seeds"), help="where the runs go")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options, extra = parser.parse_known_args(argv)
    summaries = []
    for seed in options.seeds:
        summaries.append(run(seed, options.folder, extra))
        options.output.mkdir(parents=True, exist_ok=True)
        aside = options.output / "r1_seeds.json.part"
        aside.write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, options.output / "r1_seeds.json")
    print("\n".join(lines(summaries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
