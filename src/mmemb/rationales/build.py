"""Builds a whole rationale pool, candidates and scores, in one process while the others wait."""

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
    """Opens the rationale pool for these pairs, and first makes or finishes it if necessary.

    Args:
        pairs: the pairs to train on. A new pool is made from these. A finished pool may have more.
        workers: propose the candidates.
        evaluator: scores the candidates. None suits a selector that needs no scores.
        path: folder, ``.parquet`` file or ``bundled:pool``. A file is reused and never made.
        k: maximum number of candidates per worker and pair.
        seed: seed from which the seed of every sampled candidate is derived.
        model: the model in training, for workers and an evaluator that use it.
        leaks: flags candidates that contain the target. None means the default check.
        shard_size: pairs per shard of a new pool.
        progress: whether to show progress bars and print a line after each stage.
        is_builder: whether this process makes the pool (rank zero). The others wait, see `mmemb.rationales.maker_lock`.
        barrier: called once the pool exists, so that all processes wait for each other.

    Raises:
        FileNotFoundError: the path names a file that does not exist.
        ValueError: the existing pool was made from other data or settings (the message gives both hashes), or the
            process that makes the pool has stopped.
    """
    place = resolve(path)
    if place.suffix == ".parquet" and not place.is_file():
        raise FileNotFoundError(f"{place}: this pool file does not exist; to make a pool, give a folder as its path")
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
    # The settings checked below name the model. They need it even if this process made nothing.
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
    """Whether the pool has all its candidates and scores.

    Looks at file names only: a shard that exists is whole.
    """
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
