"""A small file of pairs, and a data module that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmemb.data.datamodule import PairDataModule, Source


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def two_tasks(folder: Path) -> Source:
    """Writes ``pairs.jsonl`` with ten rows of the task `even` and seven of `odd`."""
    rows = [
        {"query": f"{task} question {row}", "positive": f"{task} answer {row}", "task": task}
        for task, count in (("even", 10), ("odd", 7))
        for row in range(count)
    ]
    return Source(write_rows(folder / "pairs.jsonl", rows))


def make(source: Source, **options: Any) -> PairDataModule:
    return PairDataModule([source], batch_size=4, sub_batch_size=2, steps_per_epoch=5, seed=3, **options)
