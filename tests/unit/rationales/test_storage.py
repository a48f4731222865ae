"""Only one process makes a pool's shards at a time. Scores are finite. A single file reads like its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmemb.rationales import pool as pool_module
from mmemb.rationales import storage as pool_files
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from mmemb.rationales.storage import sole_maker
from mmemb.types import Pair
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs


def candidates_only(pairs: list[Pair], path: Path) -> RationalePool:
    return generate(pairs, [Numbered()], 4, pool=path, seed=0, progress=False, shard_size=4)


class Other(ByNumber):
    """The same evaluator under another name, which may score one pair's rationales with nan."""

    def __init__(self, unsure: str = "") -> None:
        super().__init__()
        self.unsure = unsure

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        scores = super().score(pairs, rationales)
        return [
            math.nan if pair.id == self.unsure and text is not None else value
            for pair, text, value in zip(pairs, rationales, scores, strict=True)
        ]


def test_two_processes_cannot_make_one_pool(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    with (
        sole_maker(tmp_path / "pool"),
        pytest.raises(ValueError, match="pool: another process is making candidates here; wait until it has ended"),
    ):
        candidates_only(pairs, tmp_path / "pool")
    assert candidates_only(pairs, tmp_path / "pool").complete


def test_two_processes_can_score_only_by_different_evaluators(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    pool = candidates_only(pairs, tmp_path / "pool")
    with sole_maker(pool.path, "scores-ByNumber"):
        with pytest.raises(ValueError, match="another process is making scores-ByNumber here"):
            score(pairs, ByNumber(), pool.path, progress=False)
        score(pairs, Other(), pool.path, progress=False)
    assert score(pairs, ByNumber(), pool.path, progress=False).complete


def test_a_nan_score_is_refused_and_finished_scores_are_kept(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    pool = candidates_only(pairs, tmp_path / "pool")
    with pytest.raises(ValueError, match=r"evaluator 'Other': the score of the pair '.*' with .* is nan, not a finite"):
        score(pairs, Other(unsure=pairs[5].id), pool.path, progress=False)
    assert len(list(pool.path.glob("scores-Other-*"))) == 1  # the first shard only: the pair is in the second
    assert score(pairs, Other(), pool.path, progress=False).complete


def test_a_single_file_is_indexed_in_pieces_and_has_row_groups_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_files, "ROW_GROUP", 5)
    pairs = make_pairs(61)
    candidates_only(pairs, tmp_path / "pool")
    pool = score(pairs, ByNumber(), tmp_path / "pool", progress=False)
    whole = [pool.candidates(pair.id) for pair in pairs]
    shipped = RationalePool.open(pool.export(tmp_path / "pool.parquet"))
    groups = pq.ParquetFile(shipped.path).metadata
    assert groups.num_row_groups > 10
    assert {groups.row_group(number).num_rows for number in range(groups.num_row_groups - 1)} == {5}
    for rows in (1, 2, 7, 65536):
        monkeypatch.setattr(pool_module, "_INDEX_ROWS", rows)
        for path in (pool.path, shipped.path):
            again = RationalePool.open(path)
            assert again.pair_ids == [pair.id for pair in pairs]
            assert len(again) == 61
            assert [again.candidates(pair.id) for pair in pairs] == whole
