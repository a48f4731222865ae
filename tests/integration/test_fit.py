"""The main job end to end, through the command that users start, at a length where quality is chance."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integration.small import SETTINGS, start, write_settings

pytestmark = pytest.mark.slow
STEPS = 25
TASKS = {"name": 150, "flagattr": 200}
"""Candidates of each task's test split."""
CONTROLLERS = ("never", "always_reason", "threshold", "rl", "random", "oracle")
MODES = (*CONTROLLERS, "true_rationale", "before_training", "chance")


def sources(split: str, limit: int) -> list[dict[str, Any]]:
    return [{"path": f"bundled:{split}", "tasks": list(TASKS), "limit": limit}]


CHANGES: dict[str, Any] = {
    "trainer": {"max_steps": STEPS, "val_check_interval": 20, "limit_val_batches": 1},
    "model": {
        "phases": [{"objective": {"joint": {"chunk_size": 8}}, "warmup_steps": 2}],
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
        "budget": 12,
        "validation_queries": 4,
    },
    "data": {
        "train": sources("train", 100),
        "validation": sources("validation", 6),
        "test": sources("test", 6),
        "batch_size": 16,
        "sub_batch_size": 8,
        "num_workers": 1,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("fit")
    process = start(folder, "fit", *write_settings(folder, CHANGES))
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, error[-3000:]
    assert "Traceback" not in error
    assert "hit@1" in out
    return folder / "runs" / "r1+small" / "version_0"


@pytest.fixture(scope="module")
def events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_the_losses_fall(events: Any) -> None:
    for name in ("loss", "infonce_direct", "infonce_reasoned", "next_token"):
        values = [event.value for event in events.Scalars(f"joint/{name}")]
        assert len(values) == STEPS
        assert sum(values[-5:]) < 0.9 * sum(values[:5]), (name, values)


def test_every_step_and_validation_is_logged(events: Any) -> None:
    scalars = events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("validation/never/hit@1")] == [STEPS - 6]
    assert "validation/always_reason/hit@1" in scalars
    assert "joint/learning_rate" in scalars


def test_the_summary_has_the_schema_and_nothing_else(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["settings", "modes", "versions", "seconds"]
    assert summary["settings"]["step"] == STEPS
    assert summary["settings"]["split"] == "test"
    assert summary["settings"]["seed"] == SETTINGS["seed_everything"]
    assert summary["settings"]["backbone"].startswith("tiny@")
    assert {"mmemb", "python", "torch", "lightning", "transformers"} <= summary["versions"].keys()
    assert 0 < summary["seconds"] < 280
    assert set(summary["modes"]) == set(MODES)
    for mode, scores in summary["modes"].items():
        measured = set() if mode == "chance" else {"queries_per_second", "gain_over_random_routing"}
        assert set(scores) == {"hit@1", "invocation_rate", "tokens_per_query", "by_task"} | measured, mode
        assert set(scores["by_task"]) == set(TASKS)
        for task, by_task in scores["by_task"].items():
            assert {"hit@1", "n", "candidates", "invocation_rate", "tokens_per_query"} <= by_task.keys()
            assert (by_task["n"], by_task["candidates"]) == (6, TASKS[task])
        mean = sum(by_task["hit@1"] for by_task in scores["by_task"].values()) / len(TASKS)
        assert scores["hit@1"] == pytest.approx(mean)


def test_modes_cost_what_they_should(run: Path) -> None:
    modes = json.loads((run / "summary.json").read_text(encoding="utf-8"))["modes"]
    for mode in ("never", "before_training", "chance"):
        assert (modes[mode]["invocation_rate"], modes[mode]["tokens_per_query"]) == (0, 0)
    for mode in ("always_reason", "true_rationale"):
        assert modes[mode]["invocation_rate"] == 1
        assert modes[mode]["tokens_per_query"] > 2  # the two brackets and at least something between them
    for mode in ("threshold", "rl", "random", "oracle"):
        assert 0 <= modes[mode]["invocation_rate"] <= 1
    assert modes["oracle"]["hit@1"] >= max(modes[mode]["hit@1"] for mode in CONTROLLERS)
    assert modes["chance"]["hit@1"] == pytest.approx((1 / 150 + 1 / 200) / 2)
    assert modes["never"]["by_task"]["name"].keys() >= {"hit@5", "mrr", "chance", "queries_per_second"}


def test_the_page_the_pictures_and_the_curves_are_there(run: Path, events: Any) -> None:
    page = (run / "summary.md").read_text(encoding="utf-8")
    for word in (*TASKS, *MODES):
        assert word in page
    with Image.open(run / "gallery.png") as gallery:
        width, height = gallery.size
    assert width > 500
    assert height > 1000  # ten queries
    shown = events.Images("evaluation/gallery")[-1]
    assert (shown.width, shown.height, shown.step) == (width, height, STEPS)
    assert {"evaluation/quality_tokens", "evaluation/gallery"} <= set(events.Tags()["images"])
    with (run / "quality_tokens.csv").open(encoding="utf-8") as file:
        assert {row["curve"] for row in csv.DictReader(file)} == {"rl", "threshold", "oracle", "random"}
    assert (run / "quality_tokens.png").stat().st_size > 1000


def test_the_run_can_be_made_again(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    assert {"config.yaml", "checkpoints"} <= files
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not [path for path in run.rglob("*.part")]
