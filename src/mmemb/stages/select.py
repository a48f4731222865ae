"""Stage 1, pair-aware selection: an evaluator scores each pair's candidates against no rationale; a selector chooses.

    gain(r) = c(q, t | do(r)) - c(q, t | do(none))        [A]

The arms *none* and *each candidate* are scored once, shard by shard as in `mmemb.stages.generate`, and kept in the
pool; the choice is a pure function of pool and seed, made anew in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mmemb.data.pool import RationalePool
from mmemb.data.pool_files import (
    candidates_shard,
    data_digest,
    exists,
    read_manifest,
    resolve,
    scores_shard,
    write_manifest,
    write_shard,
)
from mmemb.data.pool_report import show_pair
from mmemb.digests import digest, seed_of
from mmemb.interfaces import Evaluator, Selector, Worker
from mmemb.stages.generate import bar, generate, generation_settings, say
from mmemb.types import Pair, Rationale


class Selected(NamedTuple):
    """What a pair trains on: the rationale (None: the direct path alone) and its loss weight."""

    rationale: Rationale | None
    weight: float


def evaluator_name(evaluator: Evaluator) -> str:
    """What the evaluator's columns are called: its short name, else its class's."""
    return evaluator.name or type(evaluator).__qualname__


def score(pairs: Sequence[Pair], evaluator: Evaluator, pool: str | Path, *, progress: bool = True) -> RationalePool:
    """Scores a pool's candidates, or goes on with what is there.

    Equal texts of a pair are scored once.

    Args:
        pairs: the pairs that the pool was made from; the evaluator's negatives come from them.
        evaluator: gives the confidence.
        pool: the folder, every candidate in place.
        progress: a bar with rate and time left, and a line at the end.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: the pool is of other data, incomplete or read-only, or scored by this evaluator with other settings.
    """
    folder, name, settings = resolve(pool), evaluator_name(evaluator), evaluator.settings
    manifest = read_manifest(pool)
    asked = data_digest(pairs)
    if manifest.data != asked:
        raise ValueError(
            f"{folder}: made from other data (hash {manifest.data}, this run asks for {asked}); "
            f"name the same data, or make the pool anew under another path"
        )
    if name in manifest.evaluators and digest(manifest.evaluators[name]) != digest(settings):
        there = digest(manifest.evaluators[name])
        raise ValueError(
            f"{folder}: scored by {name!r} with other settings (hash {there}, this run asks for {digest(settings)}); "
            f"make the pool anew under another path, or delete it"
        )
    if folder.is_file():
        if name not in manifest.evaluators:
            raise ValueError(
                f"{folder}: a single-file pool is read-only, and {name!r} has not scored it; name a folder"
            )
        return RationalePool.open(pool, evaluator=name)
    absent = [start for start in manifest.starts() if not candidates_shard(folder, start).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} of {len(manifest.starts())} shards have no candidates yet; "
            f"finish `mmemb rationales generate` first"
        )
    # Before the first score, so that whoever finds scores also finds what they mean.
    write_manifest(folder, replace(manifest, evaluators={**manifest.evaluators, name: settings}))
    missing = [start for start in manifest.starts() if not scores_shard(folder, name, start).is_file()]
    done = len(pairs) - sum(len(pairs[start : start + manifest.shard_size]) for start in missing)
    gains: list[float] = []
    if missing:
        evaluator.prepare_bank(pairs)
    with bar("score rationales", len(pairs), done=done, show=progress) as advance:
        for start in missing:
            shard = pairs[start : start + manifest.shard_size]
            table, of_shard = _score_shard(candidates_shard(folder, start), shard, evaluator, name)
            write_shard(scores_shard(folder, name, start), table)
            gains += of_shard
            advance(len(shard))
    if progress:
        kept = sum(gain > 0 for gain in gains) / len(gains) if gains else math.nan
        mean = sum(gains) / len(gains) if gains else math.nan
        say(
            f"{folder}: {len(gains)} candidates scored by {name}, mean gain {mean:+.3f}, {kept:.0%} help; "
            f"{done} of {len(pairs)} pairs were there already"
        )
    return RationalePool.open(pool, evaluator=name)


def build_pool(
    pairs: Sequence[Pair],
    *,
    workers: Sequence[Worker],
    evaluator: Evaluator | None,
    path: str | Path,
    k: int,
    seed: int,
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
        progress: bars and a line at the end of each stage.
        is_builder: whether this process makes the pool (rank zero); the others wait.
        barrier: where all processes meet once the pool is there.

    Raises:
        FileNotFoundError: the path names a file that is not there.
        ValueError: the pool that is there was made from other data or settings; the message gives both hashes.
    """
    place = resolve(path)
    if place.suffix == ".parquet" and not place.is_file():
        raise FileNotFoundError(f"{place}: no such pool; name a folder to make one there")
    name = evaluator_name(evaluator) if evaluator is not None else None
    if is_builder and not _finished(path, name):
        generate(pairs, workers, k, pool=path, seed=seed, progress=progress)
        if evaluator is not None:
            score(pairs, evaluator, path, progress=progress)
    barrier()
    pool = RationalePool.open(path, evaluator=name)
    pool.check(
        pairs,
        generation=generation_settings(workers, k, seed),
        evaluator=evaluator.settings if evaluator is not None else None,
    )
    return pool


def choose(pool: RationalePool, selector: Selector, pair_id: str, seed: int) -> Selected:
    """A pair's rationale for one epoch: ``(rationale or None, loss weight)``.

    Args:
        pool: candidates and scores.
        selector: chooses among them.
        pair_id: the pair.
        seed: of the epoch (and run); what differs by pair is added here, so the choice is the same on every rank.

    Raises:
        ValueError: the pool does not know the pair, or lacks scores that the selector needs.
    """
    candidates = pool.candidates(pair_id)
    selection = selector.select(candidates, seed=seed_of(seed, pair_id))
    chosen = None if selection.index is None else candidates.rationales[selection.index]
    return Selected(chosen, selection.weight)


def show(
    pair: Pair, pool: RationalePool, selector: Selector | None = None, *, seed: int = 0, console: Console | None = None
) -> None:
    """Prints a pair with its candidates, their gains and, if a selector is given, its choice for a seed.

    Raises:
        ValueError: as `choose`.
    """
    candidates = pool.candidates(pair.id)
    selection = selector.select(candidates, seed=seed_of(seed, pair.id)) if selector is not None else None
    show_pair(pair, candidates, selection, console=console)


def _finished(path: str | Path, evaluator: str | None) -> bool:
    if not exists(path):
        return False
    known = evaluator is None or evaluator in read_manifest(path).evaluators
    return known and RationalePool.open(path, evaluator=evaluator).complete


def _score_shard(path: Path, pairs: Sequence[Pair], evaluator: Evaluator, name: str) -> tuple[pa.Table, list[float]]:
    """A shard's score table, row for row as its candidates, and the gains."""
    rows = pq.read_table(path, columns=["pair_id", "text"], use_threads=False).to_pylist()
    by_id = {pair.id: pair for pair in pairs}
    distinct = {(row["pair_id"], row["text"]): None for row in rows if row["text"] is not None}
    nones = dict(zip(by_id, evaluator.score(pairs, [None] * len(pairs)), strict=True))
    texts = evaluator.score([by_id[pair_id] for pair_id, _ in distinct], [text for _, text in distinct])
    score_of = dict(zip(distinct, texts, strict=True))
    columns = {
        "pair_id": pa.array([row["pair_id"] for row in rows], pa.string()),
        f"{name}.candidate": pa.array([score_of.get((row["pair_id"], row["text"])) for row in rows], pa.float32()),
        f"{name}.none": pa.array([nones[row["pair_id"]] for row in rows], pa.float32()),
    }
    return pa.table(columns), [value - nones[pair_id] for (pair_id, _), value in score_of.items()]
