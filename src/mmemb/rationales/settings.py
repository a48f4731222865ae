"""From pool settings to the choice a phase trains on: makes or reuses the pool; the selector chooses per pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmemb.common.checks import check_numbers
from mmemb.interfaces import Choose, Evaluator, Model, Selector, SetupContext, Worker
from mmemb.rationales.build import build_pool
from mmemb.rationales.choose import CandidateSource, choose_many
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import evaluator_name
from mmemb.types import Pair, Rationale


class PoolSettings:
    """Where rationale candidates come from and are kept.

    Args:
        path: the pool's folder, a Parquet file, or `bundled:pool` for the one shipped with the bundled data.
        workers: who writes candidates when the pool is made; null takes the pool as it is.
        evaluator: who scores them; null takes the scores that are there.
        candidates: K, candidates a worker and query.
        seed: seed of every sampled candidate.
        leaks: flags candidates that hold the target, which are then left out; null: the default check.
        shard_size: pairs written at once: what a stopped run does, and pays for, again.

    Raises:
        ValueError: candidates or shard_size is below one.
    """

    def __init__(
        self,
        path: str,
        *,
        workers: list[Worker] | None = None,
        evaluator: Evaluator | None = None,
        candidates: int = 4,
        seed: int = 0,
        leaks: LeakCheck | None = None,
        shard_size: int = 256,
    ) -> None:
        check_numbers("model.pool", at_least=1, candidates=candidates, shard_size=shard_size)
        self.path = path
        self.workers = workers or []
        self.evaluator = evaluator
        self.candidates = candidates
        self.seed = seed
        self.leaks = leaks
        self.shard_size = shard_size

    def open(
        self,
        pairs: Sequence[Pair],
        *,
        model: Model,
        is_builder: bool = True,
        barrier: Callable[[], object] = lambda: None,
    ) -> RationalePool:
        """The pool for these pairs: reused if it matches; made first if workers are named and it is missing.

        Args:
            pairs: the training pairs.
            model: the model as it is, which workers and evaluator may use.
            is_builder: whether this process makes a missing pool (rank zero); the others wait for it.
            barrier: where all processes meet.

        Raises:
            FileNotFoundError: there is no pool and no worker to make one.
            ValueError: the pool was made from other data or settings, or is not finished and nobody is named to do it.
        """
        if not self.workers:
            if self.evaluator is not None:
                self.evaluator.setup(SetupContext(model=model))
            pool = self.reopen()
            pool.check_complete("before training reads it")
            pool.check(pairs, evaluator=None if self.evaluator is None else self.evaluator.settings)
            self.release()
            return pool
        pool = build_pool(
            pairs,
            workers=self.workers,
            evaluator=self.evaluator,
            path=Path(self.path) if "bundled:" not in self.path else self.path,
            k=self.candidates,
            seed=self.seed,
            model=model,
            leaks=self.leaks,
            shard_size=self.shard_size,
            is_builder=is_builder,
            barrier=barrier,
        )
        self.release()
        return pool

    def release(self) -> None:
        """Gives back what the workers and the evaluator hold of their own models: training needs the memory."""
        for worker in self.workers:
            worker.release()
        if self.evaluator is not None:
            self.evaluator.release()

    def reopen(self, *, keep_leaks: bool = False) -> RationalePool:
        """The pool that is there, with the scores of the evaluator named here.

        Args:
            keep_leaks: whether candidates that leak are given as well.

        Raises:
            FileNotFoundError: there is no pool.
            ValueError: it is no pool, or that evaluator has not scored it.
        """
        name = None if self.evaluator is None else evaluator_name(self.evaluator)
        return RationalePool.open(self.path, evaluator=name, keep_leaks=keep_leaks)

    def choice(self, pool: CandidateSource, selector: Selector) -> Choose:
        """What the objective asks for each pair of a batch."""

        def choice(pair: Pair, seed: int) -> list[tuple[Rationale, float]]:
            return choose_many(pool, selector, pair.id, seed)

        return choice
