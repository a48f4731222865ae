"""Scores are made once and resume exactly. A matching pool is reused, others are refused. Choices are reproducible."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmemb.components.selectors.all import All
from mmemb.interfaces import Model, Selector
from mmemb.rationales import maker_lock as waiting
from mmemb.rationales import score as select
from mmemb.rationales.build import build_pool
from mmemb.rationales.choose import choose, show
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from mmemb.rationales.settings import PoolSettings
from mmemb.rationales.storage import read_manifest, write_manifest
from mmemb.types import Candidates, Image, Item, Pair, Selection, Text
from tests.unit.inference.fakes import FakeBackbone, FakePooler
from tests.unit.rationales.fakes import ByNumber, Killed, Numbered, make_pairs


class Best(Selector):
    """Selects the best candidate with half the weight if it beats no rationale."""

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        ranked = sorted(range(len(candidates.scores)), key=lambda index: -candidates.scores[index])
        if not ranked or candidates.scores[ranked[0]] <= candidates.score_none:
            return Selection(None)
        return Selection(ranked[0], 0.5)


class Drawn(Selector):
    """Selects a candidate by the seed alone."""

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        count = len(candidates.rationales)
        return Selection(seed % count if count else None)


def build(pairs: list[Pair], path: Path | str, **changes: Any) -> RationalePool:
    settings = {"workers": [Numbered()], "evaluator": ByNumber(), "k": 4, "seed": 0, "progress": False, **changes}
    return build_pool(pairs, path=path, **settings)


def candidates_only(pairs: list[Pair], path: Path, *, shard_size: int = 4) -> RationalePool:
    return generate(pairs, [Numbered()], 4, pool=path, seed=0, progress=False, shard_size=shard_size)


def test_every_arm_is_scored_once(tmp_path: Path) -> None:
    class Repeating(Numbered):
        def propose(self, items, k, *, seed):  # type: ignore[no-untyped-def]
            return [2 * rationales for rationales in super().propose(items, k, seed=seed)]

    pairs = make_pairs(10)
    evaluator = ByNumber()
    pool = build(pairs, tmp_path / "pool", workers=[Repeating()], evaluator=evaluator)
    distinct = sum(len({each.text for each in pool.candidates(pair.id).rationales}) for pair in pairs)
    placebos = sum(len(set(pool.candidates(pair.id).scores_placebo)) for pair in pairs)
    assert evaluator.rows == len(pairs) + distinct + placebos
    assert evaluator.calls == 1  # one call for all arms of a shard: an evaluator may share their prompt
    assert evaluator.bank == [pair.id for pair in pairs]
    for pair in pairs:
        found = pool.candidates(pair.id)
        assert found.scores == pytest.approx([evaluator.value(each.text) for each in found.rationales])


def test_rationales_of_the_target_side_are_not_scored(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    generate(pairs, [Numbered()], 4, pool=tmp_path / "pool", seed=0, progress=False, sides=("query", "target"))
    pool = score(pairs, ByNumber(), tmp_path / "pool", progress=False)
    assert any(pool.candidates(pair.id, side="target").rationales for pair in pairs)
    for pair in pairs:
        assert all(map(math.isnan, pool.candidates(pair.id, side="target").scores))
        assert not any(map(math.isnan, pool.candidates(pair.id).scores))


@pytest.mark.parametrize("die_at", [0, 1, 2])
def test_scoring_that_stopped_anywhere_resumes_to_the_same_scores(tmp_path: Path, die_at: int) -> None:
    pairs = make_pairs(10)
    for name in ("whole", "pool"):
        candidates_only(pairs, tmp_path / name)
    score(pairs, ByNumber(), tmp_path / "whole", progress=False)
    with pytest.raises(Killed):
        score(pairs, ByNumber(die_at=die_at), tmp_path / "pool", progress=False)
    resumed = ByNumber()
    score(pairs, resumed, tmp_path / "pool", progress=False)
    assert resumed.calls == 3 - die_at  # one call per shard
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "pool" / path.name).read_bytes()


def test_build_finishes_a_half_scored_pool(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    candidates_only(pairs, tmp_path / "pool")
    with pytest.raises(Killed):
        score(pairs, ByNumber(die_at=2), tmp_path / "pool", progress=False)
    assert not RationalePool.open(tmp_path / "pool").complete
    assert build(pairs, tmp_path / "pool").complete


def test_training_refuses_an_unfinished_pool(tmp_path: Path) -> None:
    pairs, path, model = make_pairs(10), tmp_path / "pool", Model(FakeBackbone(), FakePooler())
    with pytest.raises(Killed):
        generate(pairs, [Numbered(die_at=2)], 4, pool=path, seed=0, progress=False, shard_size=4)
    settings = PoolSettings(str(path))
    with pytest.raises(ValueError, match="8 of 10 pairs have their candidates; finish `mmemb rationales generate`"):
        settings.open(pairs, model=model)
    candidates_only(pairs, path)
    assert len(settings.open(pairs, model=model)) == 10  # training that needs no scores accepts it
    with pytest.raises(Killed):
        score(pairs, ByNumber(die_at=2), path, progress=False)
    with pytest.raises(ValueError, match="8 of 10 pairs have scores by 'ByNumber'; finish `mmemb rationales score`"):
        settings.open(pairs, model=model)
    score(pairs, ByNumber(), path, progress=False)
    assert settings.open(pairs, model=model).complete


def test_scoring_keeps_the_settings_that_another_run_has_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, path = make_pairs(10), tmp_path / "pool"
    manifest = candidates_only(pairs, path).manifest
    real = select.data_digest

    def slow(some: list[Pair]) -> str:
        write_manifest(path, replace(manifest, evaluators={"other": {"of": "another run"}}))
        return real(some)

    monkeypatch.setattr(select, "data_digest", slow)
    score(pairs, ByNumber(), path, progress=False)
    assert read_manifest(path).evaluators == {"other": {"of": "another run"}, "ByNumber": {"shift": 0.0}}


def test_scores_without_settings_in_the_manifest_are_refused(tmp_path: Path) -> None:
    pairs, path = make_pairs(10), tmp_path / "pool"
    manifest = candidates_only(pairs, path).manifest
    score(pairs, ByNumber(), path, progress=False)
    write_manifest(path, manifest)
    with pytest.raises(ValueError, match="manifest does not have their settings; delete .*scores-ByNumber-"):
        score(pairs, ByNumber(shift=1.0), path, progress=False)
    assert read_manifest(path) == manifest


def test_a_matching_pool_is_reused_even_for_some_of_its_pairs(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    build(pairs, tmp_path / "pool")
    worker, evaluator = Numbered(), ByNumber()
    pool = build(pairs[7:2:-1], tmp_path / "pool", workers=[worker], evaluator=evaluator)
    assert worker.calls == []
    assert evaluator.calls == 0
    assert len(pool) == 10


def test_a_file_is_reused_and_never_made(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = build(pairs, tmp_path / "pool").export(tmp_path / "pool.parquet")
    worker = Numbered()
    assert build(pairs, path, workers=[worker]).pair_ids == [pair.id for pair in pairs]
    assert worker.calls == []
    with pytest.raises(FileNotFoundError, match="other.parquet: .*does not exist; .*folder"):
        build(pairs, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no pair 'pair-10'"):
        build(make_pairs(11), path)


def test_an_unscored_file_cannot_be_scored(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = candidates_only(pairs, tmp_path / "pool").export(tmp_path / "pool.parquet")
    with pytest.raises(ValueError, match="no scores by 'ByNumber', and .*read-only"):
        score(pairs, ByNumber(), path, progress=False)


def test_a_scored_file_needs_no_scoring(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = build(pairs, tmp_path / "pool").export(tmp_path / "pool.parquet")
    evaluator = ByNumber()
    assert score(pairs, evaluator, path, progress=False).evaluator == "ByNumber"
    assert evaluator.calls == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "made by workers with other settings .*different: k"),
        ({"seed": 1}, "made by workers with other settings .*different: seed"),
        ({"workers": [Numbered(label="b")]}, "made by workers with other settings .*different: workers"),
        ({"evaluator": ByNumber(shift=1.0)}, "scored by an evaluator with other settings .*different: shift"),
    ],
)
def test_a_pool_made_with_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pairs = make_pairs(10)
    build(pairs, tmp_path / "pool")
    with pytest.raises(ValueError, match=message) as caught:
        build(pairs, tmp_path / "pool", **changes)
    assert "this run needs" in str(caught.value)
    assert "again under another path" in str(caught.value)


def test_score_refuses_other_data_other_settings_and_missing_candidates(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    path = tmp_path / "pool"
    with pytest.raises(FileNotFoundError, match="no rationale pool here"):
        score(pairs, ByNumber(), path, progress=False)
    with pytest.raises(Killed):
        generate(pairs, [Numbered(die_at=2)], 4, pool=path, seed=0, progress=False, shard_size=4)
    with pytest.raises(ValueError, match="1 of 3 shards have no candidates yet; finish `mmemb rationales generate`"):
        score(pairs, ByNumber(), path, progress=False)
    build(pairs, path)
    with pytest.raises(ValueError, match="made from other data"):
        score(pairs[:9], ByNumber(), path, progress=False)
    with pytest.raises(ValueError, match="scored by 'ByNumber' with other settings .*scores-ByNumber-.*are kept"):
        score(pairs, ByNumber(shift=1.0), path, progress=False)
    for shard in path.glob("scores-ByNumber-*.parquet"):
        shard.unlink()
    again = score(pairs, ByNumber(shift=1.0), path, progress=False)
    assert again.manifest.evaluators == {"ByNumber": {"shift": 1.0}}
    assert again.complete


def test_settings_of_a_run_that_scored_nothing_are_ignored(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    candidates_only(pairs, tmp_path / "pool")
    with pytest.raises(Killed):
        score(pairs, ByNumber(die_at=0), tmp_path / "pool", progress=False)
    assert build(pairs, tmp_path / "pool", evaluator=ByNumber(shift=1.0)).complete


def test_a_run_with_nothing_to_score_reports_no_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = make_pairs(10)
    build(pairs, tmp_path / "pool")
    capsys.readouterr()
    score(pairs, ByNumber(), tmp_path / "pool")
    assert "ByNumber scored 0 candidates; 10 of 10 pairs already" in capsys.readouterr().err


def test_open_releases_the_models_of_workers_and_evaluator(tmp_path: Path) -> None:
    released = []

    class Holding(Numbered):
        def release(self) -> None:
            released.append("worker")

    class Weighing(ByNumber):
        def release(self) -> None:
            released.append("evaluator")

    settings = PoolSettings(str(tmp_path / "pool"), workers=[Holding()], evaluator=Weighing())
    model = Model(FakeBackbone(), FakePooler())
    assert settings.open(make_pairs(6), model=model).complete
    assert released == ["worker", "evaluator"]


def test_one_process_builds_the_pool_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, path = make_pairs(10), tmp_path / "pool"
    worker, looks, met = Numbered(), [], []

    def look(seconds: float) -> None:
        """The work of rank zero between two checks of another rank: it fails, then makes the rest, then scores."""
        assert not met
        looks.append(sorted(file.name for file in tmp_path.rglob("*-*.parquet")))
        if len(looks) == 1:
            with pytest.raises(Killed):
                generate(pairs, [Numbered(die_at=1)], 4, pool=path, seed=0, progress=False, shard_size=5)
        elif len(looks) == 2:
            build(pairs, path, evaluator=None)
        else:
            build(pairs, path)

    monkeypatch.setattr(waiting.time, "sleep", look)
    pool = build(pairs, path, workers=[worker], is_builder=False, barrier=lambda: met.append("met"))
    assert [len(files) for files in looks] == [0, 1, 2]
    assert met == ["met"]
    assert worker.calls == []
    assert len(pool) == 10
    assert pool.complete
    assert not waiting.sign_of(path).exists()


def test_a_selector_without_scores_needs_no_evaluator(tmp_path: Path) -> None:
    pairs = make_pairs(10)
    pool = build(pairs, tmp_path / "pool", evaluator=None)
    assert pool.evaluator is None
    assert pool.complete
    assert any(choose(pool, Drawn(), pair.id, 0).rationale for pair in pairs)


def test_the_choice_has_the_weight_of_the_selector(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    pool = build(pairs, tmp_path / "pool")
    chosen = {pair.id: choose(pool, Best(), pair.id, 0) for pair in pairs}
    assert {rationale is None for rationale, _ in chosen.values()} == {True, False}
    for pair_id, (rationale, weight) in chosen.items():
        found = pool.candidates(pair_id)
        better = [value for value in found.scores if value > found.score_none]
        assert (rationale is None) == (not better)
        if rationale is not None:
            assert weight == 0.5
            assert found.scores[found.rationales.index(rationale)] == max(better)


def test_a_phase_trains_on_all_rationales_of_the_selector(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    pool = build(pairs, tmp_path / "pool")
    settings = PoolSettings(str(tmp_path / "pool"))
    one, every = settings.choice(pool, Best()), settings.choice(pool, All())
    for pair in pairs:
        rationale, weight = choose(pool, Best(), pair.id, 3)
        assert one(pair, 3) == ([] if rationale is None else [(rationale, weight)])
        assert [each for each, _ in every(pair, 3)] == list(pool.candidates(pair.id).rationales)


def test_the_draw_is_reproducible_and_differs_by_epoch_and_pair(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    pool = build(pairs, tmp_path / "pool")
    epochs = [[choose(pool, Drawn(), pair.id, seed) for pair in pairs] for seed in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    many = [pair.id for pair in pairs if len(pool.candidates(pair.id).rationales) == 4]
    places = {
        pool.candidates(pair_id).rationales.index(choose(pool, Drawn(), pair_id, 0).rationale)  # type: ignore[arg-type]
        for pair_id in many
    }
    assert len(places) > 1


def test_scoring_ends_with_one_line_of_gain_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = make_pairs(10)
    candidates_only(pairs, tmp_path / "pool")
    pool = score(pairs, ByNumber(), tmp_path / "pool")
    gains = [value - found.score_none for found in map(pool.candidates, pool) for value in found.scores]
    line = capsys.readouterr().err.replace("\n", " ")
    assert f"{len(gains)} candidates, mean gain {sum(gains) / len(gains):+.3f} nats" in line
    assert f"{sum(gain > 0 for gain in gains) / len(gains):.0%} have a positive gain" in line


def printed(pair: Pair, pool: RationalePool, selector: Selector | None) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the console
    show(pair, pool, selector, console=console)
    return console.export_text()


def test_show_prints_candidates_gains_and_the_choice(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    pool = build(pairs, tmp_path / "pool")
    chosen = next(pair for pair in pairs if choose(pool, Best(), pair.id, 0).rationale)
    text = printed(chosen, pool, Best())
    found = pool.candidates(chosen.id)
    for rationale, value in zip(found.rationales, found.scores, strict=True):
        line = next(line for line in text.splitlines() if rationale.text in line and "numbered" in line)
        assert f"{value - found.score_none:+.3f}" in line
        assert ("▶" in line) == (rationale == choose(pool, Best(), chosen.id, 0).rationale)
    assert chosen.positive.text in text
    assert chosen.query.text in text
    direct = next(pair for pair in pairs if choose(pool, Best(), pair.id, 0).rationale is None)
    assert "trains the direct path alone" in printed(direct, pool, Best())
    assert "▶" not in printed(chosen, pool, None)


def test_show_accepts_pictures_brackets_and_missing_scores(tmp_path: Path) -> None:
    pair = Pair(
        "[bold]1", "t", Item("see", (Image("bundled:noto/1f600"), Text("[red]x"))), Item("", (Text("[/]"),)), "t1"
    )
    pool = build([pair, *make_pairs(1)], tmp_path / "pool", evaluator=None)
    text = printed(pair, pool, None)
    assert "[bold]1" in text
    assert "see [red]x bundled:noto/1f600" in text
    assert "[/]" in text
