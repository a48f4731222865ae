"""Tests of embedding a corpus in parts: any number of processes and any interruption give the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmemb.inference.corpus import Ranks, Share, embed_to_parquet
from mmemb.inference.embedder import Embedder
from mmemb.interfaces import SetupContext
from mmemb.search.exact import read_embeddings
from mmemb.types import Item, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakePooler

ITEMS = [Item("what is", (Text(" ".join(WORDS[i % 7 : i % 7 + 1 + i % 4])),), {"id": f"n{i}"}) for i in range(11)]


class Dying(FakeBackbone):
    """Stops after a number of passes, as a killed process would."""

    passes = 1000

    def prefill(self, inputs: Any) -> Any:
        if self.passes == 0:
            raise KeyboardInterrupt
        self.passes -= 1
        return super().prefill(inputs)


def embedder(**options: Any) -> Embedder:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    return Embedder(Dying(), pooler, **options)


def embed(path: Path, rank: int = 0, world_size: int = 1, items: list[Item] = ITEMS, **options: Any) -> Share:
    return embed_to_parquet(
        options.pop("model", None) or embedder(),
        items,
        path,
        ranks=Ranks(rank, world_size),
        part_rows=options.pop("part_rows", 3),
        options=options,
    )


def test_any_number_of_processes_write_the_same_file(tmp_path: Path) -> None:
    alone = embed(tmp_path / "one.parquet")
    assert (alone.embedded, alone.found, alone.joined) == (11, 0, True)
    shares = [embed(tmp_path / "two.parquet", rank, 2) for rank in (1, 0)]
    assert [(share.embedded, share.joined) for share in shares] == [(5, False), (6, True)]
    one, two = (read_embeddings(tmp_path / name) for name in ("one.parquet", "two.parquet"))
    assert one.ids == two.ids == [f"n{i}" for i in range(11)]
    assert one.model == two.model == embedder().identity
    assert (one.embeddings - two.embeddings).abs().max() == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]


def test_an_interrupted_run_continues_with_another_number_of_processes(tmp_path: Path) -> None:
    model, path = embedder(), tmp_path / "all.parquet"
    model.backbone.passes = 2
    with pytest.raises(KeyboardInterrupt):
        embed(path, model=model)
    assert not path.exists()
    assert embed(path, 1, 3).found == 3
    rest = embed(path, 0, 1)
    assert (rest.embedded, rest.found, rest.joined) == (5, 6, True)
    embed(tmp_path / "whole.parquet")
    assert pq.read_table(path).equals(pq.read_table(tmp_path / "whole.parquet"))


def test_an_incomplete_part_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    embed(path, 0, 2)
    (tmp_path / "all.parquet.parts" / ".0000001.4711").write_bytes(b"half a part")
    assert embed(path, 1, 2).joined
    assert len(read_embeddings(path)) == 11
    assert not (tmp_path / "all.parquet.parts").exists()


def test_a_process_without_a_part_does_not_create_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    assert embed(path).joined
    assert embed(path, 7, 8) == Share(0, 0, 0, True)
    assert not (tmp_path / "all.parquet.parts").exists()


def test_parts_of_another_job_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    embed(path, 0, 2)
    for options, name in (
        ({"items": ITEMS[:-1]}, "items, rows"),
        ({"side": "target"}, "side"),
        ({"part_rows": 4}, "part_rows"),
        ({"model": embedder(budget=7)}, "budget"),
    ):
        with pytest.raises(ValueError, match=f"interrupted run with other {name}; remove the folder"):
            embed(path, 1, 2, **options)
    job = json.loads((tmp_path / "all.parquet.parts" / "job.json").read_text())
    assert job["rows"] == 11


def test_a_failure_before_the_first_part_leaves_no_files(tmp_path: Path) -> None:
    model = embedder()
    model.backbone.passes = 0
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "all.parquet", model=model)
    assert list(tmp_path.iterdir()) == []


def test_ranks_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert Ranks.from_environment() == Ranks(3, 8, 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks.from_environment() == Ranks(1, 2, 1)
