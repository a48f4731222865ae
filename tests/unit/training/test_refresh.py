"""Refresh: the coming batches see the new candidates, and a resumed run sees the same as an uninterrupted one."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from mmemb.common.digests import seed_of
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.components.selectors.best_of import BestOf
from mmemb.components.selectors.random import Random
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.components.workers.model import ModelWorker
from mmemb.data.datamodule import PairDataModule, Source
from mmemb.interfaces import Evaluator
from mmemb.rationales.choose import choose
from mmemb.rationales.gains import gains
from mmemb.rationales.generate import generate
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from mmemb.rationales.settings import PoolSettings
from mmemb.training.callbacks.refresh import FOLDER, GrownPool, RefreshPool, counts_of
from mmemb.types import Pair, Selection
from tests.unit.rationales.fakes import ByNumber, Numbered, make_pairs
from tests.unit.training.small import largest_difference, small_data, small_module, small_trainer, weights


class Plain(Evaluator):
    """A cheap evaluator that scores longer rationales higher."""

    def setup(self, context: object) -> None: ...

    def score(self, pairs: Any, rationales: Any) -> list[float]:
        return [-1.0 if text is None else -1.0 / (1 + len(text)) for text in rationales]

    settings = {"of": "length"}


def refresher(every: int = 2, **options: Any) -> RefreshPool:
    worker = ModelWorker(max_new_tokens=4)
    settings = {"worker": worker, "evaluator": Plain(), "candidates": 2, **options}
    return RefreshPool(every, **settings)


def run(folder: Path, callback: RefreshPool, *, steps: int, resume: Path | None = None, workers: int = 0) -> Any:
    """Makes a small run on the bundled pool. Returns the module and the trainer."""
    module = small_module(selector=Random(), pool=PoolSettings("bundled:pool"))
    trainer = small_trainer(folder, max_steps=steps, callbacks=[callback])
    trainer.fit(module, datamodule=small_data(num_workers=workers), ckpt_path=resume)
    return module, trainer


def texts(folder: Path) -> dict[str, list[str | None]]:
    """Reads what each refresh of a run proposed."""
    found = {}
    for path in sorted((folder / FOLDER).glob("step-*/rank-*")):
        pool = RationalePool.open(path)
        found[path.parent.name] = [each.text for pair in pool for each in pool.candidates(pair).rationales]
    return found


def test_the_pairs_of_the_coming_steps_get_candidates_of_the_model_in_training(tmp_path: Path) -> None:
    callback = refresher(2, evaluator=RetrievalEvaluator(negatives=4))
    module, _ = run(tmp_path, callback, steps=4)
    assert callback.steps == [2]  # none at the end: no step would train on it
    pool = RationalePool.open(tmp_path / FOLDER / "step-000000002" / "rank-0")
    data = small_data()
    data.setup("fit")
    sampler = data._sampler("train")
    coming = {data.stream_pairs("train")[row].id for index in (2, 3) for row in sampler.batch(index)}
    assert set(pool) == coming
    assert pool.complete
    models = {each.model for pair in pool for each in pool.candidates(pair).rationales}
    assert models == {module.backbone.identity}
    found = [pool.candidates(pair) for pair in pool]
    assert all(math.isfinite(each) for candidates in found for each in candidates.scores)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_only_batches_after_a_refresh_see_its_candidates(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int]] = []

    class Newest(Random):
        """Chooses the run's own candidate if there is one."""

        def select(self, candidates: Any, *, seed: int) -> Any:
            own = [row for row, each in enumerate(candidates.rationales) if each.seed in range(2**63) and each.tokens]
            of_run = [row for row in own if candidates.scores[row] > 0]
            return Selection(of_run[0] if of_run else None)

    class High(Plain):
        """Gives high scores, by which the run's own candidates are recognised."""

        def score(self, pairs: Any, rationales: Any) -> list[float]:
            return [0.0 if text is None else 100.0 for text in rationales]

    module = small_module(selector=Newest(), pool=PoolSettings("bundled:pool"))
    step = module.phases[0].objective.step

    def watched(parts: Any, batch: Any, engine: Any) -> Any:
        reasoned = sum(len(chunk.query.rows) for chunk in batch.chunks)
        trained.append((module.global_step, reasoned))
        return step(parts, batch, engine)

    monkeypatch.setattr(module.phases[0].objective, "step", watched)
    trainer = small_trainer(tmp_path, max_steps=5, callbacks=[refresher(3, evaluator=High())])
    trainer.fit(module, datamodule=small_data(num_workers=workers))
    assert [number for number, _ in trained] == [0, 1, 2, 3, 4]
    assert [reasoned > 0 for _, reasoned in trained] == [False, False, False, True, True]


@pytest.mark.slow
def test_a_resumed_run_proposes_and_trains_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", refresher(2), steps=6)
    _, trainer = run(tmp_path / "first", refresher(2), steps=4)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")  # a refresh was due here, but the run had ended
    # The folder that a process leaves if it is killed after its last checkpoint.
    shutil.copytree(tmp_path / "first" / FOLDER / "step-000000002", tmp_path / "first" / FOLDER / "step-000000004")
    resumed, _ = run(tmp_path / "second", refresher(2), steps=6, resume=tmp_path / "at4.ckpt")
    assert list(texts(tmp_path / "second")) == ["step-000000002", "step-000000004"]
    assert texts(tmp_path / "second") == texts(tmp_path / "whole")
    assert largest_difference(weights(whole), weights(resumed)) == 0.0

    shutil.rmtree(tmp_path / "first" / FOLDER / "step-000000002")
    with pytest.raises(FileNotFoundError, match="candidates that are gone"):
        run(tmp_path / "third", refresher(2), steps=6, resume=tmp_path / "at4.ckpt")


def test_workers_and_evaluators_free_their_own_models_after_each_refresh(tmp_path: Path) -> None:
    released: list[str] = []

    class Held(Plain):
        def release(self) -> None:
            released.append("evaluator")

    class Worker(ModelWorker):
        def release(self) -> None:
            released.append("worker")

    _, trainer = run(tmp_path, refresher(worker=Worker(max_new_tokens=4), evaluator=Held()), steps=3)
    times = len(texts(tmp_path))
    assert times >= 1
    assert released == ["worker", "evaluator"] * times


def test_a_run_that_was_moved_finds_its_candidates(tmp_path: Path) -> None:
    _, trainer = run(tmp_path / "first", refresher(2), steps=3)
    trainer.save_checkpoint(tmp_path / "first" / "checkpoints" / "last.ckpt")
    proposed = texts(tmp_path / "first")
    assert list(proposed) == ["step-000000002"]
    (tmp_path / "first").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    for folder in (tmp_path / "second", tmp_path / "moved"):  # the folder of another run, and that of the moved run
        run(folder, refresher(2), steps=4, resume=last)
        assert texts(folder) == proposed


def test_the_share_of_self_made_candidates_is_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="log")
    module = small_module(selector=Random(), pool=PoolSettings("bundled:pool"))
    trainer = small_trainer(tmp_path, max_steps=3, callbacks=[refresher(2)], logger=logger)
    trainer.fit(module, datamodule=small_data())
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        (row,) = [each for each in csv.DictReader(file) if each.get("refresh/self_made")]
    assert row["step"] == "2"
    assert 0 < float(row["refresh/self_made"]) < 1
    assert float(row["refresh/covered"]) == 1.0
    assert 0 < float(row["refresh/self_made_chosen"]) < 1
    assert float(row["refresh/keep_rate"]) == 1.0
    assert float(row["refresh/mean_gain"]) > 0
    assert (Path(logger.log_dir) / FOLDER / "step-000000002").is_dir()


@pytest.mark.parametrize("most", [4, None])
def test_the_soonest_pairs_are_refreshed_and_shares_are_of_all_coming_pairs(tmp_path: Path, most: int | None) -> None:
    from lightning.pytorch.loggers import CSVLogger

    check, logger = LeakCheck(min_words=3), CSVLogger(tmp_path, name="log")
    pool = PoolSettings(str(tmp_path / "pool"), workers=[MetadataWorker()], candidates=1, leaks=check)
    sources = [Source(path="bundled:train", tasks=["name"], limit=32)]
    data = PairDataModule(train=sources, batch_size=8, sub_batch_size=8)
    trainer = small_trainer(tmp_path, max_steps=2, callbacks=[refresher(1, most_pairs=most)], logger=logger)
    trainer.fit(small_module(selector=Random(), pool=pool), datamodule=data)
    added = RationalePool.open(Path(logger.log_dir, FOLDER, "step-000000001", "rank-0"))
    assert added.manifest.generation["leaks"] == check.settings  # the settings of the pool and not the default
    assert len(added) == (8 if most is None else most)
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        (row,) = [each for each in csv.DictReader(file) if each.get("refresh/self_made")]
    assert float(row["refresh/covered"]) == len(added) / 8
    new = sum(len(added.candidates(pair).rationales) for pair in added)
    assert float(row["refresh/self_made"]) == pytest.approx(new / (new + 8), abs=1e-4)  # each pair had one before


class Witness(L.Callback):
    """Writes a rank's coming pairs after the first refresh, and its current choice for every pair."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            data = pl_module.datamodule
            choices = {
                pair.id: [
                    [rationale.text, weight] for rationale, weight in pl_module.phases[0].objective._choose(pair, 0)
                ]
                for pair in data.stream_pairs("train")
            }
            seen = {"coming": [pair.id for pair in data.coming_pairs(1)], "choices": choices}
            (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_two_ranks_choose_from_one_pool_and_log_what_both_have_made(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    pool = PoolSettings(str(tmp_path / "pool"), workers=[MetadataWorker()], candidates=1)  # rank zero makes it
    data = PairDataModule(
        train=[Source(path="bundled:train", tasks=["name"], limit=32)], batch_size=8, sub_batch_size=8
    )
    # With this seed, each rank alone would log other figures than both together.
    callback = refresher(1, worker=Numbered(), evaluator=ByNumber(), candidates=3, most_pairs=6, seed=6)
    trainer = small_trainer(
        tmp_path,
        max_steps=2,
        callbacks=[callback, Witness(tmp_path)],
        logger=CSVLogger(tmp_path, name="log", version=0),
        devices=2,
        strategy=DDPStrategy(start_method="spawn"),
    )
    trainer.fit(small_module(selector=Random(), pool=pool), datamodule=data)

    folder = tmp_path / "log" / "version_0"
    own = [RationalePool.open(folder / FOLDER / "step-000000001" / f"rank-{rank}") for rank in (0, 1)]
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        assert list(own[rank]) == seen[rank]["coming"][:6]
    assert not set(seen[0]["coming"]) & set(seen[1]["coming"])
    assert seen[0]["choices"] == seen[1]["choices"]
    for each in own:  # the ranks agree, also where only one of them has proposed
        new = {rationale.text for pair in each for rationale in each.candidates(pair).rationales}
        assert new & {text for choice in seen[0]["choices"].values() for text, _ in choice}

    grown = GrownPool(RationalePool.open(tmp_path / "pool"), own)
    data.setup("fit")  # the ranks set up their own copies in their processes
    coming = [[pair for pair in data.stream_pairs("train") if pair.id in each["coming"]] for each in seen]
    gained = [[gain for pair in each for gain in gains(each.candidates(pair))] for each in own]

    def shares(ranks: list[int]) -> dict[str, float]:
        pairs, worth = ([each for rank in ranks for each in found[rank]] for found in (coming, gained))
        every, made, chosen, made_chosen = counts_of(grown, Random(), pairs, seed=seed_of(callback.seed, 1))
        return {
            "covered": sum(len(own[rank]) for rank in ranks) / len(pairs),
            "self_made": made / every,
            "self_made_chosen": made_chosen / chosen,
            "mean_gain": sum(worth) / len(worth),
            "keep_rate": sum(gain > 0 for gain in worth) / len(worth),
        }

    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        (row,) = [each for each in csv.DictReader(file) if each.get("refresh/self_made")]
    both = shares([0, 1])
    assert {name: float(row[f"refresh/{name}"]) for name in both} == pytest.approx(both, abs=1e-6)
    for rank in (0, 1):
        alone = shares([rank])
        assert [name for name in both if abs(both[name] - alone[name]) < 1e-3] == ["covered"]


def test_candidates_are_counted_in_all_and_among_those_chosen(tmp_path: Path) -> None:
    class Last(Random):
        """Chooses the run's own candidate if there is one."""

        def select(self, candidates: Any, *, seed: int) -> Any:
            return Selection(len(candidates.rationales) - 1 if candidates.rationales else None)

    pairs, base, own = two_pools(tmp_path)
    counts = counts_of(GrownPool(base, [own]), Last(), pairs, seed=0)
    there, new = ([len(pool.candidates(pair.id).rationales) for pair in pairs] for pool in (base, own))
    assert counts.every == sum(there) + sum(new)
    assert counts.made == sum(new)
    assert counts.chosen == sum(a + b > 0 for a, b in zip(there, new, strict=True))
    assert counts.made_chosen == sum(map(bool, new))
    alone = counts_of(GrownPool(base, []), Last(), pairs, seed=0)
    assert alone == (sum(there), 0, sum(map(bool, there)), 0)
    assert counts_of(GrownPool(base, [own]), Last(), [], seed=0) == (0, 0, 0, 0)


def two_pools(folder: Path, *, is_scored: bool = True) -> tuple[list[Pair], RationalePool, RationalePool]:
    pairs = make_pairs(12)
    for name, label, evaluator in (("base", "a", ByNumber()), ("own", "b", ByNumber(shift=7.0))):
        generate(pairs, [Numbered(label=label)], 3, pool=folder / name, seed=0, progress=False)
        if is_scored or name == "own":
            score(pairs, evaluator, folder / name, progress=False)
    return pairs, RationalePool.open(folder / "base"), RationalePool.open(folder / "own")


def test_a_grown_pool_keeps_every_gain_and_puts_the_base_pools_candidates_first(tmp_path: Path) -> None:
    pairs, base, own = two_pools(tmp_path)
    grown = GrownPool(base, [own])
    seen = 0
    for pair in pairs:
        there, new, both = base.candidates(pair.id), own.candidates(pair.id), grown.candidates(pair.id)
        assert both.rationales == there.rationales + new.rationales
        assert both.score_none == there.score_none
        gains = [value - both.score_none for value in both.scores[len(there.scores) :]]
        assert gains == pytest.approx([value - new.score_none for value in new.scores], abs=1e-5)
        assert len(both.scores) == len(both.rationales)
        assert grown.added(pair.id) == len(new.rationales)
        seen += len(new.rationales)
    assert seen > 5
    for pair in pairs:
        assert GrownPool(base, [base]).candidates(pair.id) == base.candidates(pair.id)  # no candidate is there twice
        assert GrownPool(base, []).candidates(pair.id) == base.candidates(pair.id)


def test_a_pool_without_scores_grows_without_scores(tmp_path: Path) -> None:
    pairs, base, own = two_pools(tmp_path, is_scored=False)
    grown = GrownPool(base, [own])
    many = next(pair.id for pair in pairs if grown.added(pair.id))
    assert all(map(math.isnan, grown.candidates(many).scores))
    assert choose(grown, Random(), many, 0).rationale is not None
    with pytest.raises(ValueError, match="have not been scored"):
        choose(grown, BestOf(), many, 0)


@pytest.mark.parametrize("name", ["candidates", "most_pairs", "keep"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"refresh\.{name} is 0; give 1 or more"):
        refresher(**{name: 0})
    with pytest.raises(ValueError, match="refresh_every_n_steps is 0"):
        refresher(0)


def test_a_run_without_a_pool_has_nothing_to_refresh(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, callbacks=[refresher()])
    with pytest.raises(ValueError, match="nothing to refresh; give model.pool and model.selector"):
        trainer.fit(small_module(), datamodule=small_data())
    assert torch.is_grad_enabled()


def test_the_recipe_adds_the_refresh_to_the_default_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmemb.commands.parsing.lightning_cli import check_config

    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    both = check_config(["fit", "--config", "recipes/r1.yaml", "--config", "recipes/r1_refresh.yaml"])
    alone = check_config(["fit", "--config", "recipes/r1.yaml"])
    added = "mmemb.training.callbacks.refresh.RefreshPool"
    assert [each.class_path for each in alone.trainer.callbacks] == [
        "mmemb.training.callbacks.checkpoint.RunCheckpoint"
    ]
    assert [each.class_path for each in both.trainer.callbacks] == [
        "mmemb.training.callbacks.checkpoint.RunCheckpoint",
        added,
    ]
