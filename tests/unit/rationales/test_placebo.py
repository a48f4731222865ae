"""A candidate's placebo is another pair's rationale of the same task, by the same worker with the same settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmemb.rationales.build import build_pool
from mmemb.rationales.gains import gains
from mmemb.rationales.generate import generate
from mmemb.rationales.placebo import Placebos
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.storage import write_shard
from mmemb.types import Pair
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs


def build(pairs: list[Pair], path: Path, *workers: Numbered) -> RationalePool:
    return build_pool(pairs, workers=workers, evaluator=ByNumber(), path=path, k=4, seed=0, progress=False)


def test_a_placebo_is_another_pairs_rationale_of_the_same_task_and_worker(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    # Two of every four pairs share their target, so the rationale of one may be right for the other.
    pairs = [replace(pair, positive_id=f"t{number // 4}") for number, pair in enumerate(pairs)]
    pool = build(pairs, tmp_path / "pool", Numbered(), Numbered(label="b"))
    of_task: dict[str, dict[float, set[str]]] = {}
    for pair in pairs:
        for each in pool.candidates(pair.id).rationales:
            value = round(ByNumber().value(each.text), 6)
            of_task.setdefault(pair.task, {}).setdefault(value, set()).add(pair.positive_id)
    seen = set()
    for pair in pairs:
        found = pool.candidates(pair.id)
        assert len(found.scores_placebo) == len(found.rationales)
        for value in found.scores_placebo:
            others = of_task[pair.task][round(value, 6)] - {pair.positive_id}
            assert others, "a placebo comes from a pair of the task with another target"
            assert round(value, 6) not in {round(each, 6) for each in found.scores}
            seen.add(value)
    assert len(seen) > 10


def test_the_only_pair_of_a_task_has_no_placebo(tmp_path: Path) -> None:
    pairs = [replace(pair, task=pair.id) for pair in make_pairs(6)]
    pool = build(pairs, tmp_path / "pool", Numbered())
    for pair in pairs:
        found = pool.candidates(pair.id)
        assert all(map(math.isnan, found.scores_placebo))
        assert gains(found, net_of_placebo=True) == gains(found)


def test_donors_are_rationales_of_queries_without_leaks(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    both = generate(pairs, [Numbered()], 4, pool=tmp_path / "both", seed=0, progress=False, sides=("query", "target"))
    of_query = generate(pairs, [Numbered()], 4, pool=tmp_path / "query", seed=0, progress=False)
    shard = "candidates-000000000.parquet"
    expected = Placebos.collect([of_query.path / shard], pairs)
    assert Placebos.collect([both.path / shard], pairs)._donors == expected._donors

    table = pq.read_table(of_query.path / shard)
    flags = pa.array(["verbatim" if number % 2 else "" for number in range(table.num_rows)])
    write_shard(of_query.path / shard, table.set_column(table.schema.get_field_index("leaks"), "leaks", flags))
    leaking = {text for number, text in enumerate(table["text"].to_pylist()) if number % 2}
    found = Placebos.collect([of_query.path / shard], pairs)._donors
    texts = {donor.text for donors in found.values() for donor in donors}
    clean = {text for number, text in enumerate(table["text"].to_pylist()) if number % 2 == 0}
    assert texts <= clean
    assert leaking - clean


def test_workers_of_one_kind_give_each_other_no_placebos(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    pool = build(pairs, tmp_path / "pool", Numbered(), Numbered(label="b"))
    placebos = Placebos.collect([pool.path / "candidates-000000000.parquet"], pairs)
    rows = pq.read_table(pool.path / "candidates-000000000.parquet").to_pylist()
    found = []
    for pair in pairs:
        of_pair = [row for row in rows if row["pair_id"] == pair.id and row["text"] is not None]
        found += [
            (row["text"][0], text[0]) for row, text in zip(of_pair, placebos.of(pair, of_pair), strict=True) if text
        ]
    assert {own for own, _ in found} == {"a", "b"}
    assert all(own == other for own, other in found)
