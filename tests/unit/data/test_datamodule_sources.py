"""The data module and its sources and settings: mixtures, stages and invalid values."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from mmemb.data.datamodule import PairDataModule, Source
from mmemb.data.sources import Stream
from tests.unit.data.small import make, two_tasks, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return two_tasks(tmp_path)


def drawn(data: PairDataModule, batches: int = 500) -> dict[str, float]:
    """Returns the share of each task."""
    data.steps_per_epoch = batches
    data.setup("fit")
    tasks = Counter(pair.task for batch in data.train_dataloader() for pair in batch)
    return {task: count / sum(tasks.values()) for task, count in tasks.items()}


def test_tasks_are_drawn_by_the_weight_of_their_source(tmp_path: Path, source: Source) -> None:
    other = Source(write_rows(tmp_path / "third.jsonl", [{"query": "q", "positive": "p"}]), weight=2.0)
    assert drawn(make(source)) == pytest.approx({"even": 0.5, "odd": 0.5}, abs=0.05)
    mixed = PairDataModule([source, other], batch_size=4, sub_batch_size=2)
    assert drawn(mixed) == pytest.approx({"even": 0.25, "odd": 0.25, "third": 0.5}, abs=0.05)
    named = PairDataModule([source, other], batch_size=4, sub_batch_size=2, task_weights={"even": 4.0, "odd": 0.0})
    assert drawn(named) == pytest.approx({"even": 2 / 3, "third": 1 / 3}, abs=0.05)


def test_a_task_in_two_files_is_one_task(tmp_path: Path, source: Source) -> None:
    more = Source(write_rows(tmp_path / "more.jsonl", [{"query": "q", "positive": "p", "task": "odd"}]))
    data = PairDataModule([source, more], batch_size=4, sub_batch_size=2)
    assert drawn(data) == pytest.approx({"even": 1 / 3, "odd": 2 / 3}, abs=0.05)
    assert len(data.stream_pairs("train")) == 18
    assert data.stream_pairs("train")[17].id == "odd/more:1"
    with pytest.raises(IndexError):
        data.stream_pairs("train")[18]


def test_pretraining_samples_are_one_task_without_shuffling() -> None:
    data = PairDataModule([Source("bundled:pretrain")], batch_size=4, sub_batch_size=2, steps_per_epoch=2)
    data.setup("fit")
    assert len(data.stream_pairs("train")) > 10**6
    assert [pair for batch in data.train_dataloader() for pair in batch] == [
        data.stream_pairs("train")[row] for row in range(8)
    ]


def test_predict_takes_the_queries_of_bundled_data() -> None:
    data = PairDataModule(predict=[Source("bundled:test", tasks=["fact"], limit=5)], batch_size=3)
    data.setup("predict")
    assert [len(items) for items in data.predict_dataloader()] == [3, 2]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", r"there is no train source; set data\.train to a list"),
        ("validate", "there is no validation source"),
        ("test", "there is no test source"),
        ("predict", "there is no predict source"),
    ],
)
def test_a_stage_without_a_source_is_named(stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairDataModule().setup(stage)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_workers", -1), ("batch_size", 0), ("sub_batch_size", 0), ("steps_per_epoch", -1), ("steps_per_epoch", 0)],
)
def test_a_number_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{name} is {value}; give [01] or more"):
        PairDataModule(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("sub_batch_size", -8)])
def test_a_streams_number_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^data\.streams\.more\.{name} is {value}; give 1 or more"):
        PairDataModule(streams={"more": Stream([], **{name: value})})


def test_a_source_without_rows_or_tasks_is_named() -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match=rf"^data\.train, a\.jsonl: source\.limit is {limit}; give 1 or more"):
            PairDataModule([Source("a.jsonl", limit=limit)])
    with pytest.raises(ValueError, match=r"^data\.test, a\.jsonl: source\.tasks: is empty; name tasks"):
        PairDataModule(test=[Source("a.jsonl", tasks=[])])


def test_setup_finds_invalid_sources_and_settings(tmp_path: Path, source: Source) -> None:
    with pytest.raises(FileNotFoundError, match="gone.jsonl: there is no such file"):
        PairDataModule([Source(str(tmp_path / "gone.jsonl"))]).setup("fit")
    with pytest.raises(FileNotFoundError, match="gone.jsonl: there is no such file"):
        PairDataModule([source], [Source(str(tmp_path / "gone.jsonl"))]).setup("fit")
    with pytest.raises(ValueError, match="sub_batch_size 3 must divide batch_size 8"):
        PairDataModule([source], batch_size=8, sub_batch_size=3).setup("fit")
    with pytest.raises(ValueError, match="task_weights has the task 'evn'"):
        PairDataModule([source], task_weights={"evn": 1.0}).setup("fit")
    with pytest.raises(ValueError, match=r"pairs\.jsonl: the pair id 'even/pairs:1' is in .*pairs\.jsonl too"):
        PairDataModule([source, replace(source, weight=2.0)]).setup("fit")


def test_the_signature_is_the_configuration(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PairDataModule, "data")
    train = json.dumps([{"path": source.path, "tasks": ["odd"], "weight": 0.5}])
    config = parser.parse_args([f"--data.train={train}", "--data.task_weights={odd: 2}", "--data.batch_size=4"])
    data = parser.instantiate_classes(config).data
    assert data.sources["train"] == [replace(source, tasks=["odd"], weight=0.5)]
    assert (data.streams["train"].task_weights, data.batch_size) == ({"odd": 2.0}, 4)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "rows that share a task, so that in-batch negatives are of the same kind" in words
