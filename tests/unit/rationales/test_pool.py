"""The pool reads back what was written, one row group at a time, and refuses other data or settings."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

from mmemb.common.digests import portable_id
from mmemb.data import bundled
from mmemb.data.items import content_identity
from mmemb.rationales import index as pool_index
from mmemb.rationales import pool as pool_module
from mmemb.rationales import storage as pool_files
from mmemb.rationales.build import build_pool
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool, scored
from mmemb.rationales.storage import Manifest, data_digest, read_manifest, resolve, write_shard
from mmemb.types import Candidates, Image, Item, Pair, Rationale, Text
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs

Make = Callable[..., RationalePool]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(pairs: list[Pair], *, name: str = "pool", k: int = 3) -> RationalePool:
        return build_pool(
            pairs,
            workers=[Numbered(), Numbered(label="b")],
            evaluator=ByNumber(),
            path=tmp_path / name,
            k=k,
            seed=0,
            progress=False,
        )

    return build


def everything(pool: RationalePool) -> list[Candidates]:
    return [pool.candidates(pair_id) for pair_id in pool]


def test_candidates_are_read_back_with_provenance_and_scores(make: Make) -> None:
    pairs = make_pairs(13)
    pool = make(pairs)
    worker, evaluator = Numbered(), ByNumber()
    other = Numbered(label="b")
    for pair in pairs:
        expected = [each for w in (worker, other) for each in w.propose([pair.query], 3, seed=0)[0]]
        found = pool.candidates(pair.id)
        assert list(found.rationales) == expected
        assert found.scores == pytest.approx([evaluator.value(each.text) for each in expected])
        assert found.score_none == pytest.approx(-0.5)
    assert pool.pair_ids == [pair.id for pair in pairs]
    assert len(pool) == 13
    assert "pair-12" in pool
    assert "pair-13" not in pool


def test_a_pair_without_candidates_is_in_the_pool(tmp_path: Path) -> None:
    class Silent(Numbered):
        def propose(self, items, k, *, seed):  # type: ignore[no-untyped-def]
            return [[] for _ in items]

    pairs = make_pairs(3)
    pool = build_pool(
        pairs, workers=[Silent()], evaluator=ByNumber(), path=tmp_path / "pool", k=2, seed=0, progress=False
    )
    found = pool.candidates("pair-1")
    assert found.rationales == ()
    assert found.scores == ()
    assert found.score_none == -0.5
    assert pool.complete


def test_scores_are_nan_before_scoring(tmp_path: Path) -> None:
    pool = generate(make_pairs(4), [Numbered()], 3, pool=tmp_path / "pool", seed=0, progress=False)
    found = [each for each in everything(pool) if each.rationales][0]
    assert all(map(math.isnan, found.scores))
    assert len(found.scores) == len(found.rationales)
    assert math.isnan(found.score_none)
    with pytest.raises(ValueError, match="have not been scored; run `mmemb rationales score`"):
        scored(found)


def test_the_size_of_row_groups_and_shards_changes_no_candidates(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(601)
    whole = everything(make(pairs))
    monkeypatch.setattr(pool_files, "ROW_GROUP", 5)
    small = make(pairs, name="small")
    assert pq.ParquetFile(small.path / "candidates-000000000.parquet").num_row_groups > 50
    assert everything(small) == whole


def test_the_cache_of_row_groups_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_files, "ROW_GROUP", 5)
    monkeypatch.setattr(pool_module, "_CACHE_BYTES", 4000)
    pool = make(make_pairs(300))
    first = everything(pool)
    held = sum(table.nbytes for table in pool._groups.values())
    assert held == pool._cached
    assert held <= 4000
    assert len(pool._groups) > 1
    assert everything(pool) == first


def test_a_pool_of_many_shards_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(30)
    path = tmp_path / "pool"
    generate(pairs, [Numbered()], 3, pool=path, seed=0, progress=False, shard_size=1)
    pool = build_pool(pairs, workers=[Numbered()], evaluator=ByNumber(), path=path, k=3, seed=0, progress=False)
    expected = everything(pool)
    monkeypatch.setattr(pool_module, "_OPEN_FILES", 4)
    monkeypatch.setattr(pool_module, "_CACHE_BYTES", 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    frugal = RationalePool.open(path)
    assert everything(frugal) == expected == everything(frugal)
    assert len(frugal._files) <= 4
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8


def written_pool(folder: Path, count: int, *, candidates: int = 5, shard_size: int = 1000) -> list[str]:
    """Writes a scored pool of many pairs column by column. Returns the pair ids."""
    ids = [f"task/train/{number:07d}" for number in range(count)]
    folder.mkdir()
    for start in range(0, count, shard_size):
        rows = [pair_id for pair_id in ids[start : start + shard_size] for _ in range(candidates)]
        constant = {name: [""] * len(rows) for name in ("task", "model", "settings", "finish_reason", "leaks")}
        table = {"pair_id": rows, "text": [f"a thought about {row}" for row in rows], "side": ["query"] * len(rows)}
        columns = {
            name: (table | constant).get(name, pa.nulls(len(rows))) for name in pool_files.CANDIDATE_SCHEMA.names
        }
        write_shard(
            pool_files.candidates_shard(folder, start),
            pa.table(columns, schema=None).cast(pool_files.CANDIDATE_SCHEMA),
        )
        scores = {"pair_id": rows, "e.candidate": [-1.0] * len(rows), "e.none": [-2.0] * len(rows)}
        write_shard(pool_files.scores_shard(folder, "e", start), pa.table(scores))
    manifest = Manifest(data="0", pairs=count, generation={}, evaluators={"e": {}}, shard_size=shard_size)
    pool_files.write_manifest(folder, manifest)
    return ids


def test_a_large_pool_is_never_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader keeps an index of 20 bytes per pair and a bounded cache. A look-up decodes two row groups."""
    ids = written_pool(tmp_path / "pool", 20_000)
    decoded: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, *arguments: object, **options: object) -> pa.Table:
        table = real(self, *arguments, **options)
        decoded.append(table.num_rows)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(pool_module, "_CACHE_BYTES", 2**20)
    pool = RationalePool.open(tmp_path / "pool")
    assert decoded == []  # opening reads only the column of pair ids, one file at a time
    assert len(pool) == 20_000
    assert pool._index.nbytes == 20 * 20_000
    order = random.Random(0).sample(ids, 200)
    for pair_id in order:
        found = pool.candidates(pair_id)
        assert [each.text for each in found.rationales] == [f"a thought about {pair_id}"] * 5
        assert pool._cached <= 2**20
    assert len(decoded) <= 4 * len(order)  # candidates and scores, from two row groups if a pair is in both
    assert max(decoded) <= pool_files.ROW_GROUP


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_read_the_pool_in_any_order(context: str, tmp_path: Path) -> None:
    ids = written_pool(tmp_path / "pool", 300, shard_size=64)
    order = random.Random(0).sample(ids, 120)
    pool = RationalePool.open(tmp_path / "pool")
    pool.candidates(order[0])  # the parent now has open files and cached row groups
    loader = DataLoader(Looked(pool, order), batch_size=7, num_workers=2, multiprocessing_context=context)
    assert [text for batch in loader for text in batch] == [f"a thought about {pair_id}" for pair_id in order]


class Looked(Dataset[str]):
    """Returns the first candidate of each pair."""

    def __init__(self, pool: RationalePool, ids: list[str]) -> None:
        self.pool = pool
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> str:
        return self.pool.candidates(self.ids[number]).rationales[0].text


def test_pairs_with_equal_hashes_are_distinguished(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(12)
    expected = everything(make(pairs))
    monkeypatch.setattr(pool_index, "number_of", lambda pair_id: len(pair_id))
    pool = make(pairs)
    assert [pool.candidates(pair.id) for pair in pairs] == expected
    with pytest.raises(ValueError, match="no pair 'nobody'"):
        pool.candidates("nobody")


def test_export_writes_one_file_with_the_same_content(make: Make, tmp_path: Path) -> None:
    pairs = make_pairs(300)
    pool = make(pairs)
    path = pool.export(tmp_path / "deep" / "pool.parquet")
    shipped = RationalePool.open(path)
    assert everything(shipped) == everything(pool)
    assert shipped.manifest == pool.manifest
    assert shipped.evaluator == "ByNumber"
    assert shipped.complete
    assert [entry.name for entry in path.parent.iterdir()] == ["pool.parquet"]


def test_an_unscored_pool_can_be_exported(tmp_path: Path) -> None:
    pool = generate(make_pairs(4), [Numbered()], 3, pool=tmp_path / "pool", seed=0, progress=False)
    shipped = RationalePool.open(pool.export(tmp_path / "pool.parquet"))
    assert [each.rationales for each in everything(shipped)] == [each.rationales for each in everything(pool)]
    assert shipped.evaluator is None


def test_an_unfinished_pool_cannot_be_exported(make: Make, tmp_path: Path) -> None:
    path, target = make(make_pairs(600)).path, tmp_path / "pool.parquet"  # three shards
    (path / "scores-ByNumber-000000256.parquet").unlink()
    with pytest.raises(ValueError, match="344 of 600 pairs have scores by 'ByNumber'; finish `mmemb rationales score`"):
        RationalePool.open(path).export(target)
    (path / "candidates-000000256.parquet").unlink()
    with pytest.raises(ValueError, match="344 of 600 pairs have their candidates; finish `mmemb rationales generate`"):
        RationalePool.open(path).export(target)
    assert not target.exists()


def test_rows_keep_their_settings_and_hashes(make: Make) -> None:
    pool = make(make_pairs(6))
    table = pq.read_table(pool.path / "candidates-000000000.parquet")
    row = next(row for row in table.to_pylist() if row["text"])
    assert json.loads(row["settings"]) == {"worker": "Numbered", "label": row["text"][0]}
    assert len(row["settings_hash"]) == 16
    assert row["side"] == "query"
    assert table.schema.names == pool_files.CANDIDATE_SCHEMA.names


def test_a_pool_can_be_sent_to_other_processes(make: Make) -> None:
    pool = make(make_pairs(20))
    expected = everything(pool)
    assert everything(pickle.loads(pickle.dumps(pool))) == expected
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(pool.candidates, pool.pair_ids) == expected


def test_check_accepts_a_subset_in_any_order(make: Make) -> None:
    pairs = make_pairs(20)
    pool = make(pairs)
    pool.check(pairs)
    pool.check(pairs[::-3])


def test_check_accepts_data_whose_picture_targets_moved(make: Make) -> None:
    def pairs_on(disk: str) -> list[Pair]:
        query = Item("find", (Text("it"),))
        single = Item("", (Image(f"{disk}/photos/0.png"),))
        several = Item("", (Image(f"{disk}/photos/1.png"), Text("a caption")))
        return [
            Pair(f"p{number}", "t", query, each, content_identity(each))
            for number, each in enumerate((single, several))
        ]

    pool = make(pairs_on("/disk/a"))
    pool.check(pairs_on("/mnt/b"))
    assert data_digest(pairs_on("/disk/a")) == data_digest(pairs_on("/mnt/b"))
    moved = replace(pairs_on("/mnt/b")[0], positive_id="another")  # an identity given in the data is taken unchanged
    with pytest.raises(ValueError, match="the pair 'p0' has changed"):
        pool.check([moved])


def test_a_bundled_picture_target_is_identified_by_its_name() -> None:
    target = Item("", (Image("bundled:noto/1f921"),))
    assert portable_id(content_identity(target), target) == "image:bundled:noto/1f921"


def test_check_names_the_hashes_and_the_pair_of_other_data(make: Make) -> None:
    pairs = make_pairs(20)
    pool = make(pairs)
    more = make_pairs(21)
    with pytest.raises(ValueError, match=rf"hash {data_digest(pairs)}, this run needs {data_digest(more)}") as caught:
        pool.check(more)
    assert "no pair 'pair-20'" in str(caught.value)
    assert "mmemb rationales generate" in str(caught.value)
    changed = [*pairs[:7], make_pairs(1, first=99)[0], *pairs[8:]]
    changed[7] = type(pairs[7])(**{**{n: getattr(pairs[7], n) for n in pairs[7].__slots__}, "query": changed[7].query})
    with pytest.raises(ValueError, match="the pair 'pair-7' has changed"):
        pool.check(changed)


def test_check_names_the_settings_that_differ(make: Make) -> None:
    pairs = make_pairs(5)
    pool = make(pairs)
    with pytest.raises(ValueError, match="made by workers with other settings .*different: k, seed"):
        pool.check(pairs, generation={**pool.manifest.generation, "k": 9, "seed": 1})
    with pytest.raises(ValueError, match="scored by an evaluator with other settings .*different: shift"):
        pool.check(pairs, evaluator={"shift": 1.0})


def test_an_unknown_pair_is_named(make: Make) -> None:
    with pytest.raises(ValueError, match="no pair 'nobody' among its 5"):
        make(make_pairs(5)).candidates("nobody")


def test_an_unknown_evaluator_is_named(make: Make) -> None:
    pool = make(make_pairs(5))
    with pytest.raises(ValueError, match="no scores by the evaluator 'judge', only by: ByNumber"):
        RationalePool.open(pool.path, evaluator="judge")


def test_files_that_are_no_pool_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no rationale pool here; .*`mmemb rationales generate`"):
        RationalePool.open(tmp_path)
    text = tmp_path / "a.parquet"
    text.write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        RationalePool.open(text)
    write_shard(tmp_path / "b.parquet", pa.table({"a": [1]}))
    with pytest.raises(ValueError, match="a Parquet file but no rationale pool"):
        RationalePool.open(tmp_path / "b.parquet")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="not the manifest of a rationale pool"):
        RationalePool.open(tmp_path)


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_of_the_format_is_refused(tmp_path: Path, version: int) -> None:
    pool_files.write_manifest(tmp_path, Manifest(data="0", pairs=1, generation={}, version=version))
    with pytest.raises(ValueError, match=f"pool format {version}, .* reads 2; make"):
        read_manifest(tmp_path)


def test_the_manifest_is_read_back_unchanged(tmp_path: Path) -> None:
    manifest = Manifest(data="0", pairs=7, generation={"k": 2}, evaluators={"a": {"b": 1.5}}, shard_size=3)
    pool_files.write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["hash"] == manifest.hash
    assert list(manifest.starts()) == [0, 3, 6]


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "a.parquet", pa.table({"a": [1]}))
    assert list(tmp_path.iterdir()) == []


def test_bundled_is_a_file_of_the_package() -> None:
    assert resolve("bundled:pool") == Path(bundled.__file__).parent / "pool.parquet"


def test_scored_needs_a_number_per_candidate() -> None:
    good = Candidates("p", (Rationale("a"),), (-1.0,), -2.0)
    assert scored(good) == (-1.0,)
    assert scored(Candidates("p", ())) == ()
    for bad in (
        Candidates("p", (Rationale("a"),)),
        Candidates("p", (Rationale("a"),), (math.nan,), -2.0),
        Candidates("p", (Rationale("a"),), (-1.0,)),
    ):
        with pytest.raises(ValueError, match="pair 'p': its rationale candidates have not been scored"):
            scored(bad)
