"""A run of the real command small enough for a test: 24 rows with pictures of their own, the tiny model at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink", "gray", "teal")
CAPITALS = {
    "chile": "santiago",
    "ghana": "accra",
    "italy": "rome",
    "japan": "tokyo",
    "kenya": "nairobi",
    "latvia": "riga",
    "malta": "valletta",
    "nepal": "kathmandu",
    "norway": "oslo",
    "peru": "lima",
    "qatar": "doha",
    "spain": "madrid",
}
JOINT = {"class_path": "mmemb.training.joint.objective.Joint", "init_args": {"chunk_size": 4}}
SETTINGS: dict[str, Any] = {
    "seed_everything": 3,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {
        "backbone": {"class_path": "tiny", "init_args": {"weights": "random"}},
        "phases": [{"objective": JOINT, "warmup_steps": 2}],
        "selector": "random",
        "pool": {"path": "pool", "workers": ["metadata"]},
        "budget": 6,
    },
    "data": {
        "train": [{"path": "pairs.jsonl"}],
        "validation": [{"path": "pairs.jsonl"}],
        "test": [{"path": "pairs.jsonl"}],
        "batch_size": 8,
        "sub_batch_size": 4,
        "task_weights": None,
        "num_workers": 0,
    },
}
"""On top of ``recipes/r1.yaml``."""


def rows() -> list[dict[str, Any]]:
    """12 colours of pictures, 12 capitals of countries, each with a rationale."""
    shown = [
        {
            "id": colour,
            "task": "colour",
            "query": {
                "instruction": "what colour?",
                "image": f"pictures/{colour}.png",
                "fields": {"rationale": colour},
            },
            "positive": f"the colour {colour}",
        }
        for colour in COLOURS
    ]
    known = [
        {
            "id": country,
            "task": "capital",
            "query": {"text": f"capital of {country}", "fields": {"rationale": f"a city in {country}"}},
            "positive": {"text": city},
        }
        for country, city in CAPITALS.items()
    ]
    return shown + known


def write_rows(folder: Path, content: list[dict[str, Any]] | None = None) -> None:
    """``pairs.jsonl`` and its pictures."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (48, 48), colour).save(folder / "pictures" / f"{colour}.png")
    lines = (json.dumps(row) for row in (rows() if content is None else content))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings; the right ones win."""
    both = {
        key: merged(left[key], right[key])
        for key in left.keys() & right.keys()
        if isinstance(left[key], Mapping) and isinstance(right[key], Mapping)
    }
    return {**left, **right, **both}


def write_settings(folder: Path, changes: Mapping[str, Any] | None = None, name: str = "small.yaml") -> list[str]:
    """Writes the settings with changes; the words that give them to a command run in the folder."""
    (folder / name).write_text(yaml.safe_dump(merged(SETTINGS, changes or {})), encoding="utf-8")
    return ["--config", str(ROOT / "recipes" / "r1.yaml"), "--config", name]


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """``mmemb`` as its users start it, one thread, in the folder."""
    command = [str(Path(sys.executable).with_name("mmemb")), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
