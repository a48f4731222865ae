"""Settings of the rationale pool: makes or reuses the pool, and lets a selector choose the rationales per pair."""

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
    """Where rationale candidates come from, and where they are stored.

    Args:
        path: the folder or Parquet file of the pool, or `bundled:pool` for the pool of the bundled data.
        workers: write the candidates when the pool is made. With null, the pool must exist.
        evaluator: scores the candidates. With null, the existing scores are used.
        candidates: K, the number of candidates per worker and query.
        seed: seed from which the seed of every sampled candidate is derived.
        leaks: flags candidates that contain the target. They are left out. Null means the default check.
        shard_size: pairs written at once. A stopped run repeats, and pays for, at most this many pairs.

    Raises:
        ValueError: ``candidates`` or ``shard_size`` is below one.
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
        """Opens the pool for these pairs. Makes a missing or unfinished pool first if there are workers.

        Args:
            pairs: the training pairs.
            model: the model in training, in its current state. Workers and evaluator may use it.
            is_builder: whether this process makes a missing pool (rank zero). The others wait for it.
            barrier: called once the pool exists, so that all processes wait for each other.

        Raises:
            FileNotFoundError: there is no pool, and no worker to make one.
            ValueError: the pool was made from other data or settings, or it is unfinished and there is no worker.
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
        """Frees the memory of the workers' and the evaluator's own models, because training needs it."""
        for worker in self.workers:
            worker.release()
        if self.evaluator is not None:
            self.evaluator.release()

    def reopen(self, *, keep_leaks: bool = False) -> RationalePool:
        """Opens the existing pool, with the scores of the evaluator of these settings.

        Args:
            keep_leaks: whether the pool also returns candidates with leak flags.

        Raises:
            FileNotFoundError: there is no pool.
            ValueError: the path has no pool, or the evaluator has not scored it.
        """
        name = None if self.evaluator is None else evaluator_name(self.evaluator)
        return RationalePool.open(self.path, evaluator=name, keep_leaks=keep_leaks)

    def choice(self, pool: CandidateSource, selector: Selector) -> Choose:
        """Returns the function that gives the objective the rationales of a pair, with their loss weights."""

        def choice(pair: Pair, seed: int) -> list[tuple[Rationale, float]]:
            return choose_many(pool, selector, pair.id, seed)

        return choice
