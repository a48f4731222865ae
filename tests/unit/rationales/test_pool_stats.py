"""Pool statistics equal a count by hand and leave out leaks. The page escapes its texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mmemb.common.digests import digest
from mmemb.rationales.generate import generate
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.page import write_page
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from mmemb.rationales.stats import ALL, GroupStats, pool_stats, worker_suffixes
from mmemb.types import Pair
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs


class Other(Numbered):
    """Another kind of worker whose texts have the same worker's name."""


def scored_pool(folder: Path, pairs: list[Pair], *, other: type[Numbered] = Other, **options: object) -> RationalePool:
    generate(pairs, [Numbered(), other(label="b")], 3, pool=folder, seed=0, progress=False, **options)  # type: ignore[arg-type]
    score(pairs, ByNumber(), folder, progress=False)
    return RationalePool.open(folder, keep_leaks=True)


@pytest.mark.parametrize("net_of_placebo", [False, True])
def test_every_number_equals_a_count_by_hand(tmp_path: Path, net_of_placebo: bool) -> None:
    pairs = make_pairs(30)
    pool = scored_pool(tmp_path / "pool", pairs)
    done: list[int] = []
    groups = pool_stats(pool, pairs, margin=0.1, net_of_placebo=net_of_placebo, advance=done.append)
    assert sum(done) == 30
    assert [(group.task, group.worker) for group in groups] == [
        ("task-0", "numbered"),
        ("task-1", "numbered"),
        (ALL, "numbered"),
    ]
    for group in groups:
        rows = []
        for pair in pairs:
            found = pool.candidates(pair.id)
            if group.task in (ALL, pair.task):
                rows += [
                    (value - found.score_none, placebo - found.score_none)
                    for value, placebo in zip(found.scores, found.scores_placebo, strict=True)
                ]
        kept = [row for row in rows if row[0] - (max(0.0, row[1]) if net_of_placebo else 0.0) > 0.1]
        assert group.candidates == len(rows)
        assert group.mean_gain == pytest.approx(sum(gain for gain, _ in rows) / len(rows), abs=1e-6)
        assert group.keep_rate == len(kept) / len(rows)
        assert group.placebo_share == sum(placebo >= gain for gain, placebo in kept) / len(kept)
        assert group.mean_tokens == 3
        assert group.leaks == 0


def test_leaks_are_counted_and_left_out_of_other_numbers(tmp_path: Path) -> None:
    pairs = make_pairs(12)
    everything = scored_pool(tmp_path / "clean", pairs)
    # The target has a field with the label of worker "b", so every text of this worker is a leak.
    marked = [
        Pair(pair.id, pair.task, pair.query, pair.positive, pair.positive_id)
        for pair in (
            Pair(each.id, each.task, each.query, type(each.positive)("", each.positive.parts, {"secret": "b"}), "t")
            for each in pairs
        )
    ]
    pool = scored_pool(tmp_path / "leaking", marked, leaks=LeakCheck(target_fields=["secret"]))
    clean, leaking = pool_stats(everything, pairs)[-1], pool_stats(pool, marked)[-1]
    texts = [each.text for pair in pairs for each in everything.candidates(pair.id).rationales]
    assert leaking.candidates == clean.candidates == len(texts)
    assert leaking.leaks == sum(text.startswith("b") for text in texts) > 0
    assert len(leaking.gains) == len(texts) - leaking.leaks


def test_a_pool_without_scores_has_no_gain(tmp_path: Path) -> None:
    pairs = make_pairs(5)
    generate(pairs, [Numbered()], 3, pool=tmp_path / "pool", seed=0, progress=False)
    (*_, every) = pool_stats(RationalePool.open(tmp_path / "pool", keep_leaks=True), make_pairs(9))
    assert every.candidates > 0
    assert math.isnan(every.mean_gain)
    assert math.isnan(every.keep_rate)


def test_the_page_of_a_pool_is_reproducible_and_escapes_its_texts(tmp_path: Path) -> None:
    group = GroupStats("<script>", "a&b", candidates=2, kept=1)
    group.gains.extend([0.5, -math.inf])
    group.placebos.extend([math.nan, 0.1])
    facts = {"pool": "<img src=x>"}
    first = write_page(tmp_path / "a" / "one.html", [group], facts, margin=0.0).read_text(encoding="utf-8")
    second = write_page(tmp_path / "two.html", [group], facts, margin=0.0).read_text(encoding="utf-8")
    assert first == second
    assert "<script>" not in first
    assert "<img" not in first
    assert "a&amp;b" in first
    assert "50.0%" in first
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.html"]


def test_workers_of_one_kind_are_counted_separately(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    pool = scored_pool(tmp_path / "pool", pairs, other=Numbered)
    both = {group.worker: group for group in pool_stats(pool, pairs) if group.task == ALL}
    assert list(both) == ["numbered (1)", "numbered (2)"]
    texts = [each.text[0] for pair in pairs for each in pool.candidates(pair.id).rationales]
    assert [group.candidates for group in both.values()] == [texts.count("a"), texts.count("b")]


def test_workers_of_one_kind_differ_by_model_or_number() -> None:
    openai = [{"worker": "openai", "model": model, "temperature": t} for model, t in (("a", 1), ("b", 1), ("b", 2))]
    spoiled = [{"worker": "corrupting", "of": each} for each in openai[:2]]
    workers = [*openai, *spoiled, {"worker": "metadata", "templates": {}}]
    found = [worker_suffixes({"workers": workers}).get(digest(json.dumps(each, sort_keys=True))) for each in workers]
    assert found == [" (a)", " (b, 2)", " (b, 3)", " (a)", " (b)", None]
