"""A whole pool: candidates and scores, made by one process while the others wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmemb.interfaces import Evaluator, Model, SetupContext, Worker
from mmemb.rationales.generate import generate, generation_settings
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.maker_lock import at_work, sign_of, wait_until
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import evaluator_name, score
from mmemb.rationales.storage import (
    candidates_shard,
    exists,
    read_manifest,
    resolve,
    scores_shard,
)
from mmemb.types import Pair


def build_pool(
    pairs: Sequence[Pair],
    *,
    workers: Sequence[Worker],
    evaluator: Evaluator | None,
    path: str | Path,
    k: int,
    seed: int,
    model: Model | None = None,
    leaks: LeakCheck | None = None,
    shard_size: int = 256,
    progress: bool = True,
    is_builder: bool = True,
    barrier: Callable[[], object] = lambda: None,
) -> RationalePool:
    """Makes a missing pool, finishes a begun one, reuses one that matches.

    Args:
        pairs: the pairs to train on; a finished pool may have more of them, a new one is made from these.
        workers: who proposes.
        evaluator: who scores; None for a selector that needs no scores.
        path: folder, ``.parquet`` file or ``bundled:pool``; a file is never made, only reused.
        k: most candidates a worker and pair.
        seed: derives every sampled candidate.
        model: the model in training, for workers and an evaluator that use it.
        leaks: flags candidates that hold the target; None: the default check.
        shard_size: pairs a shard of a new pool.
        progress: bars and a line at the end of each stage.
        is_builder: whether this process makes the pool (rank zero); the others wait (`mmemb.rationales.maker_lock`).
        barrier: where all processes meet once the pool is there.

    Raises:
        FileNotFoundError: the path names a file that is not there.
        ValueError: the pool that is there was made from other data or settings; the message gives both hashes. Or the
            process that makes the pool is gone.
    """
    place = resolve(path)
    if place.suffix == ".parquet" and not place.is_file():
        raise FileNotFoundError(f"{place}: no such pool; name a folder to make one there")
    name = evaluator_name(evaluator) if evaluator is not None else None
    if not is_builder:
        wait_until(lambda: _finished(path, name), sign_of(place))
    elif not _finished(path, name):
        with at_work(sign_of(place)):
            generate(
                pairs,
                workers,
                k,
                pool=path,
                seed=seed,
                model=model,
                leaks=leaks,
                shard_size=shard_size,
                progress=progress,
            )
            if evaluator is not None:
                score(pairs, evaluator, path, model=model, progress=progress)
    barrier()
    # Settings name the model, also where nothing was made by this process.
    for worker in workers:
        worker.setup(SetupContext(model=model))
    if evaluator is not None:
        evaluator.setup(SetupContext(model=model))
    pool = RationalePool.open(path, evaluator=name)
    pool.check(
        pairs,
        generation=generation_settings(workers, k, seed, leaks=leaks),
        evaluator=evaluator.settings if evaluator is not None else None,
    )
    return pool


def _finished(path: str | Path, evaluator: str | None) -> bool:
    """Whether all of a pool is there and scored, by the names of its files alone: a shard that exists is whole."""
    if not exists(path):
        return False
    manifest, folder = read_manifest(path), resolve(path)
    if evaluator is not None and evaluator not in manifest.evaluators:
        return False
    if folder.is_file():
        return True
    shards = [candidates_shard(folder, start) for start in manifest.starts()]
    if evaluator is not None:
        shards += [scores_shard(folder, evaluator, start) for start in manifest.starts()]
    return all(shard.is_file() for shard in shards)
