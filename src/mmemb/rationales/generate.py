"""Generates rationale candidates and writes them into a pool (stage 0, prior simulation).

Workers write one shard (consecutive pairs) after the other. A shard is written whole. If a run is stopped, the next run
keeps the finished shards and makes the others in the same batches, so the pool is the same row for row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmemb.common import terminal
from mmemb.common.checks import check_numbers
from mmemb.common.digests import digest
from mmemb.interfaces import Model, SetupContext, Worker
from mmemb.rationales.leaks import LeakCheck
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.storage import (
    CANDIDATE_SCHEMA,
    Manifest,
    Proposal,
    Side,
    candidate_rows,
    candidates_shard,
    data_digest,
    drop_partial,
    exists,
    read_manifest,
    resolve,
    sole_maker,
    write_manifest,
    write_shard,
)
from mmemb.types import Item, Pair


def generation_settings(
    workers: Sequence[Worker], k: int, seed: int, *, sides: Sequence[Side] = ("query",), leaks: LeakCheck | None = None
) -> dict[str, Any]:
    """Returns all settings that determine the candidates of a given pair, as the manifest stores them."""
    return {
        "workers": [_worker_settings(worker) for worker in workers],
        "k": k,
        "seed": seed,
        "sides": list(sides),
        "leaks": (leaks or LeakCheck()).settings,
    }


def generate(
    pairs: Sequence[Pair],
    workers: Sequence[Worker],
    k: int,
    *,
    pool: str | Path,
    seed: int,
    model: Model | None = None,
    sides: Sequence[Side] = ("query",),
    leaks: LeakCheck | None = None,
    progress: bool = True,
    shard_size: int = 256,
) -> RationalePool:
    """Generates the candidates of a pool. Continues an unfinished pool.

    Args:
        pairs: the pairs. A worker sees one item of a pair, never both.
        workers: propose the candidates, in this order.
        k: maximum number of candidates per worker, pair and side.
        pool: the folder. A single-file pool is finished: it is only checked against these arguments.
        seed: seed from which the seed of every sampled candidate is derived.
        model: the model in training, for workers that use it.
        sides: for which items of a pair the workers write rationales. Training reads those of the queries.
        leaks: flags candidates that contain the other side. None means the default check.
        progress: whether to report progress, and a one-line summary at the end.
        shard_size: pairs per shard, the maximum that a killed run loses. An existing pool keeps its shard size.

    Raises:
        ValueError: there are no pairs, workers or sides, a number is below one, the path has a pool of other data or
            settings, or another process is making the pool.
    """
    if not pairs or not workers:
        raise ValueError(f"generate: got {len(pairs)} pairs and {len(workers)} workers; give at least one of each")
    if not sides or len(set(sides)) < len(sides) or not set(sides) <= {"query", "target"}:
        raise ValueError(f"generate: sides is {list(sides)}; give query, target or both, each once")
    check_numbers("generate", at_least=1, k=k, shard_size=shard_size)  # else the pool cannot be finished or read
    folder, check = resolve(pool), leaks or LeakCheck()
    context = SetupContext(model=model, items=[_sides_of(pair, side)[0] for side in sides for pair in pairs])
    for worker in workers:
        worker.setup(context)
    asked = Manifest(
        data=data_digest(pairs),
        pairs=len(pairs),
        generation=generation_settings(workers, k, seed, sides=sides, leaks=check),
        shard_size=shard_size,
    )
    if folder.is_file():
        _resume(folder, asked)
        return RationalePool.open(pool)
    with sole_maker(folder):
        _fill(folder, asked, pairs, workers, check, progress)
    return RationalePool.open(pool)


def _fill(
    folder: Path, asked: Manifest, pairs: Sequence[Pair], workers: Sequence[Worker], check: LeakCheck, progress: bool
) -> None:
    """Makes the missing shards of candidates."""
    if exists(folder):
        asked = _resume(folder, asked)
    else:
        write_manifest(folder, asked)
    k, seed, sides = (asked.generation[name] for name in ("k", "seed", "sides"))
    settings = [json.dumps(entry, sort_keys=True) for entry in asked.generation["workers"]]
    drop_partial(folder)
    missing = [start for start in asked.starts() if not candidates_shard(folder, start).is_file()]
    done = len(pairs) - sum(len(pairs[start : start + asked.shard_size]) for start in missing)
    written = leaking = 0
    with terminal.progress("generate rationales", len(pairs), unit="pairs", done=done, show=progress) as bar:
        for start in missing:
            shard = pairs[start : start + asked.shard_size]
            proposals = _propose(shard, list(zip(workers, settings, strict=True)), k, seed, sides, check)
            rows = [
                row for pair, of_pair in zip(shard, proposals, strict=True) for row in candidate_rows(pair, of_pair)
            ]
            write_shard(candidates_shard(folder, start), pa.Table.from_pylist(rows, schema=CANDIDATE_SCHEMA))
            written += sum(row.get("text") is not None for row in rows)
            leaking += sum(bool(row.get("leaks")) for row in rows)
            bar.advance(len(shard))
    if progress:
        terminal.say(
            f"{folder}: wrote {written} new candidates, {leaking} of them flagged as leaks and left out; "
            f"{done} of {len(pairs)} pairs already had their candidates"
        )
        for line in filter(None, (worker.report for worker in workers if missing)):
            terminal.say(line)


def _propose(
    pairs: Sequence[Pair],
    workers: Sequence[tuple[Worker, str]],
    k: int,
    seed: int,
    sides: Sequence[Side],
    check: LeakCheck,
) -> list[list[Proposal]]:
    """Returns the proposals of all workers for each pair, one side after the other.

    ``workers`` has each worker with its settings as JSON.
    """
    found: list[list[Proposal]] = [[] for _ in pairs]
    for side in sides:
        items = [_sides_of(pair, side) for pair in pairs]
        for worker, settings in workers:
            proposed = worker.propose([shown for shown, _ in items], k, seed=seed)
            for of_pair, (shown, hidden), rationales in zip(found, items, proposed, strict=True):
                flags = check.flags([rationale.text for rationale in rationales], shown=shown, hidden=hidden)
                of_pair.append(Proposal(side, settings, rationales, flags))
    return found


def _sides_of(pair: Pair, side: Side) -> tuple[Item, Item]:
    """Returns the item that the worker sees, and the hidden one."""
    return (pair.query, pair.positive) if side == "query" else (pair.positive, pair.query)


def _resume(folder: Path, asked: Manifest) -> Manifest:
    """Returns the manifest of the existing pool, if its data and settings are the requested ones."""
    stored = read_manifest(folder)
    for what, there, wanted in (
        ("data", stored.data, asked.data),
        ("workers, k, seed, sides or leak check", digest(stored.generation), digest(asked.generation)),
    ):
        if there != wanted:
            raise ValueError(
                f"{folder}: the pool here was made with other {what} (hash {there}, this run needs {wanted}); "
                f"give another path, or delete the pool to make it again"
            )
    return stored


def _worker_settings(worker: Worker) -> dict[str, Any]:
    return {"worker": worker.name or type(worker).__qualname__, **worker.settings}
