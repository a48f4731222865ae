"""`validate`, `test` and `predict` on a checkpoint of a small run, in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemb.inference.embedder import Embedder
from mmemb.search.exact import read_embeddings
from tests.integration.small import CAPITALS, COLOURS, ROOT, write_rows, write_settings

Cli = Callable[..., Any]
CONSTANT = {"objective": {"joint": {"chunk_size": 4}}, "schedule": "constant", "warmup_steps": 2}
LAST = "runs/r1+small/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, settings and a run of two steps."""
    from mmemb.__main__ import main

    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    write_rows(folder)
    words = write_settings(folder, {"trainer": {"limit_val_batches": 1.0}})
    os.chdir(folder)
    try:
        assert main(["fit", *words]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def on_checkpoint(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command on the run's last checkpoint: ``(standard output, the command's own folder)``."""
    monkeypatch.chdir(trained)
    words = ["--config", "small.yaml"]

    def run(command: str, *more: str, code: int = 0) -> tuple[str, Path]:
        runs = set(trained.glob("runs/*/*"))
        done = cli(command, "--config", str(ROOT / "recipes" / "r1.yaml"), *words, "--ckpt_path", LAST, *more)
        assert done.code == code, done.err
        (new,) = set(trained.glob("runs/*/*")) - runs
        return done.out if code == 0 else done.err, new

    return run


def modes(folder: Path) -> dict[str, Any]:
    """The modes of a summary without what a clock says."""
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["modes"]
    for scores in found.values():
        scores.pop("queries_per_second", None)
        for by_task in scores["by_task"].values():
            by_task.pop("queries_per_second", None)
    return found


def test_test_finds_what_fit_found_at_its_end(on_checkpoint: Cli, trained: Path) -> None:
    out, folder = on_checkpoint("test")
    first = trained / "runs" / "r1+small" / "version_0"
    assert modes(folder) == modes(first)
    assert "before_training" in modes(folder)  # kept in the checkpoint
    left, right = (json.loads((path / "summary.json").read_text())["settings"] for path in (folder, first))
    assert left == right
    assert left["step"] == 2
    assert "colour" in out
    assert (folder / "gallery.png").is_file()


def test_the_config_of_the_run_serves_test_too(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    config = "runs/r1+small/version_0/config.yaml"
    assert cli("test", "--config", config, "--ckpt_path", LAST).code == 0


def test_validate_prints_hit_rates_of_the_validation_split(on_checkpoint: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("rich._console", None)  # one that was made before keeps the width of that time
    out, folder = on_checkpoint("validate")
    for mode in ("never", "always_reason"):
        for place in ("", "colour/", "capital/"):
            assert f"validation/{mode}/{place}hit@1" in out
    assert not (folder / "summary.json").exists()


def test_predict_writes_what_the_embedder_gives(on_checkpoint: Cli, trained: Path) -> None:
    out, folder = on_checkpoint("predict", "--data.predict=[{path: pictures}]", "--data.batch_size=5")
    path = folder / "embeddings.parquet"
    assert out.strip().endswith(f"{path.relative_to(trained)}: {len(COLOURS)} embeddings")
    index = read_embeddings(path)
    assert index.ids == sorted(f"{colour}.png" for colour in COLOURS)
    assert [len(images) for images in index.images] == [1] * len(COLOURS)
    embedder = Embedder.from_checkpoint(trained / LAST, device="cpu")
    assert index.model == embedder.identity
    expected = embedder.encode([trained / "pictures" / name for name in index.ids], reason="never").embedding
    assert (index.embeddings - expected).abs().max() < 1e-5  # other batches, so sums in another order
    assert not list(folder.glob(".*.part"))


def test_predict_is_searched(on_checkpoint: Cli, cli: Cli) -> None:
    _, folder = on_checkpoint("predict", "--data.predict=[{path: pictures}]")
    words = ["--checkpoint", LAST, "--index", str(folder / "embeddings.parquet"), "--device", "cpu"]
    done = cli("search", *words, "--image", "pictures/red.png", "--reason", "never", "--top", "1")
    assert done.code == 0, done.err
    assert "red.png" in done.out


def test_predict_names_rows_of_every_source(on_checkpoint: Cli, trained: Path) -> None:
    items = [{"id": country, "text": country} for country in CAPITALS]
    (trained / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    bundled = "{path: 'bundled:test', tasks: [fact], limit: 3}"
    _, folder = on_checkpoint("predict", f"--data.predict=[{{path: items.jsonl}}, {bundled}]")
    ids = read_embeddings(folder / "embeddings.parquet").ids
    assert ids[: len(CAPITALS)] == list(CAPITALS)
    assert len(set(ids)) == len(ids) == len(CAPITALS) + 3


def test_a_prediction_that_fails_leaves_no_file(on_checkpoint: Cli, trained: Path) -> None:
    (trained / "mixed").mkdir()
    (trained / "mixed" / "b.png").write_bytes(b"no picture")
    (trained / "mixed" / "a.png").write_bytes((trained / "pictures" / "red.png").read_bytes())
    error, folder = on_checkpoint("predict", "--data.predict=[{path: mixed}]", "--data.batch_size=1", code=2)
    assert "b.png: cannot be read" in error.strip().split("\n")[-1]
    assert not [path for path in folder.iterdir() if "embeddings" in path.name]


def test_a_finished_run_goes_on_as_if_it_had_been_longer(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    words = ["fit", *write_settings(tmp_path, {"model": {"phases": [CONSTANT]}, "evaluate": False})]
    last = [f"runs/r1+small/version_{number}/checkpoints/last.ckpt" for number in range(3)]
    assert cli(*words, "--trainer.max_steps=5").code == 0  # in the middle of the second epoch
    assert cli(*words, "--trainer.max_steps=8", "--ckpt_path", last[0]).code == 0
    assert cli(*words, "--trainer.max_steps=8").code == 0
    resumed, whole = (torch.load(path, weights_only=True) for path in last[1:])
    assert resumed["global_step"] == whole["global_step"] == 8
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
