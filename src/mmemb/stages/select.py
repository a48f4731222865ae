"""Stage 1, pair-aware selection: an evaluator scores each pair's candidates against no rationale; a selector chooses.

    gain(r) = c(q, t | do(r)) - c(q, t | do(none))        [A]

The arms *none*, *each candidate* and *placebo* (another pair's rationale for each candidate, `mmemb.stages.placebo`)
are scored once, shard by shard as in `mmemb.stages.generate`, and kept in the pool; the choice is a pure function of
pool and seed, made anew in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mmemb.data.leaks import LeakCheck
from mmemb.data.pool import RationalePool
from mmemb.data.pool_files import (
    Manifest,
    candidates_shard,
    data_digest,
    drop_partial,
    exists,
    read_manifest,
    rescore,
    resolve,
    scores_shard,
    sole_maker,
    write_manifest,
    write_shard,
)
from mmemb.data.pool_report import show_pair
from mmemb.digests import digest, seed_of
from mmemb.interfaces import Evaluator, Selector, Worker
from mmemb.stages.generate import bar, generate, generation_settings, say
from mmemb.stages.placebo import Placebos
from mmemb.stages.waiting import at_work, sign_of, wait_until
from mmemb.types import Candidates, Pair, Rationale


class Selected(NamedTuple):
    """What a pair trains on: the rationale (None: the direct path alone) and its loss weight."""

    rationale: Rationale | None
    weight: float


def evaluator_name(evaluator: Evaluator) -> str:
    """What the evaluator's columns are called: its short name, else its class's."""
    return evaluator.name or type(evaluator).__qualname__


def score(pairs: Sequence[Pair], evaluator: Evaluator, pool: str | Path, *, progress: bool = True) -> RationalePool:
    """Scores a pool's candidates, or goes on with what is there.

    Equal texts of a pair are scored once, and a pair's arms together, so that an evaluator may share their prompt.

    Args:
        pairs: the pairs that the pool was made from; the evaluator's negatives come from them.
        evaluator: gives the confidence.
        pool: the folder, every candidate in place.
        progress: a bar with rate and time left, and a line at the end.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: the pool is of other data, incomplete or read-only, or scored by this evaluator with other settings;
            another process scores it by this evaluator; a score is no number.
    """
    folder, name, settings = resolve(pool), evaluator_name(evaluator), evaluator.settings
    manifest = read_manifest(pool)
    asked = data_digest(pairs)
    if manifest.data != asked:
        raise ValueError(
            f"{folder}: made from other data (hash {manifest.data}, this run asks for {asked}); "
            f"name the same data, or make the pool anew under another path"
        )
    if folder.is_file():
        if name not in manifest.evaluators:
            raise ValueError(
                f"{folder}: a single-file pool is read-only, and {name!r} has not scored it; name a folder"
            )
        _check_settings(manifest, folder, name, settings)
        return RationalePool.open(pool, evaluator=name)
    absent = [start for start in manifest.starts() if not candidates_shard(folder, start).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} of {len(manifest.starts())} shards have no candidates yet; "
            f"finish `mmemb rationales generate` first"
        )
    with sole_maker(folder, f"scores-{name}"):
        _fill(folder, pairs, evaluator, settings, progress)
    return RationalePool.open(pool, evaluator=name)


def _fill(
    folder: Path, pairs: Sequence[Pair], evaluator: Evaluator, settings: Mapping[str, Any], progress: bool
) -> None:
    """Makes the shards of scores that are missing."""
    name = evaluator_name(evaluator)
    drop_partial(folder, f"scores-{name}")
    manifest = read_manifest(folder)  # anew: another evaluator's run may have entered itself in the meantime
    _check_settings(manifest, folder, name, settings)
    # Before the first score, so that whoever finds scores also finds what they mean.
    write_manifest(folder, replace(manifest, evaluators={**manifest.evaluators, name: settings}))
    missing = [start for start in manifest.starts() if not scores_shard(folder, name, start).is_file()]
    done = len(pairs) - sum(len(pairs[start : start + manifest.shard_size]) for start in missing)
    scored = helping = 0
    total_gain = 0.0
    placebos = Placebos({}, {})
    if missing:
        evaluator.prepare_bank(pairs)
        placebos = Placebos.collect([candidates_shard(folder, start) for start in manifest.starts()], pairs)
    with bar("score rationales", len(pairs), done=done, show=progress) as advance:
        for start in missing:
            shard = pairs[start : start + manifest.shard_size]
            table, of_shard = _score_shard(candidates_shard(folder, start), shard, evaluator, name, placebos)
            write_shard(scores_shard(folder, name, start), table)
            scored += len(of_shard)
            helping += sum(gain > 0 for gain in of_shard)
            total_gain += math.fsum(of_shard)
            advance(len(shard))
    if progress:
        worth = ""
        if scored:
            worth = f", mean gain {total_gain / scored:+.3f}, {helping / scored:.0%} help"
        say(f"{folder}: {scored} candidates scored by {name}{worth}; {done} of {len(pairs)} pairs were there already")


def build_pool(
    pairs: Sequence[Pair],
    *,
    workers: Sequence[Worker],
    evaluator: Evaluator | None,
    path: str | Path,
    k: int,
    seed: int,
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
        leaks: flags candidates that hold the target; None: the default check.
        shard_size: pairs a shard of a new pool.
        progress: bars and a line at the end of each stage.
        is_builder: whether this process makes the pool (rank zero); the others wait (`mmemb.stages.waiting`).
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
            generate(pairs, workers, k, pool=path, seed=seed, leaks=leaks, shard_size=shard_size, progress=progress)
            if evaluator is not None:
                score(pairs, evaluator, path, progress=progress)
    barrier()
    pool = RationalePool.open(path, evaluator=name)
    pool.check(
        pairs,
        generation=generation_settings(workers, k, seed, leaks=leaks),
        evaluator=evaluator.settings if evaluator is not None else None,
    )
    return pool


class CandidateSource(Protocol):
    """What a choice is made from: a pool, or a pool with what a run has added to it."""

    def candidates(self, pair_id: str) -> Candidates:
        """The candidates of a pair with their scores."""


def choose(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> Selected:
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


def choose_many(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> list[tuple[Rationale, float]]:
    """All rationales that a pair trains on in one epoch, with their weights; as `choose` otherwise."""
    candidates = pool.candidates(pair_id)
    selections = selector.select_many(candidates, seed=seed_of(seed, pair_id))
    return [(candidates.rationales[each.index], each.weight) for each in selections if each.index is not None]


def show(
    pair: Pair, pool: RationalePool, selector: Selector | None = None, *, seed: int = 0, console: Console | None = None
) -> None:
    """Prints a pair with its candidates, their gains and, if a selector is given, its choice for a seed.

    Args:
        pair: the pair.
        pool: opened with ``keep_leaks`` it shows leaking candidates too; the choice is made without them.
        selector: chooses; None shows no choice.
        seed: of the choice.
        console: where to print; None: the terminal.

    Raises:
        ValueError: as `choose`.
    """
    candidates = pool.candidates(pair.id)
    chosen = None
    if selector is not None:
        clean = [row for row, rationale in enumerate(candidates.rationales) if not rationale.leaks]
        selections = selector.select_many(_only(candidates, clean), seed=seed_of(seed, pair.id))
        chosen = [clean[each.index] for each in selections if each.index is not None]
    show_pair(pair, candidates, chosen, console=console)


def _only(candidates: Candidates, rows: Sequence[int]) -> Candidates:
    """Some of a pair's candidates."""
    scores, placebos = candidates.scores, candidates.scores_placebo
    return replace(
        candidates,
        rationales=tuple(candidates.rationales[row] for row in rows),
        scores=tuple(scores[row] for row in rows) if scores else (),
        scores_placebo=tuple(placebos[row] for row in rows) if placebos else (),
    )


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


def _check_settings(manifest: Manifest, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Refuses scores that are there and were made with other settings, or with nobody knows which.

    Settings without a single score are of a run that was stopped before its first shard: they bind nobody.
    """
    if folder.is_dir() and not any(scores_shard(folder, name, start).is_file() for start in manifest.starts()):
        return
    if name not in manifest.evaluators:
        raise ValueError(
            f"{folder}: holds scores by {name!r} with settings that its manifest does not tell; "
            + rescore(folder, name)
        )
    there, asked = digest(manifest.evaluators[name]), digest(settings)
    if there != asked:
        raise ValueError(
            f"{folder}: scored by {name!r} with other settings (hash {there}, this run asks for {asked}); "
            + ("name a folder to make it anew" if folder.is_file() else rescore(folder, name))
        )


def _score_shard(
    path: Path, pairs: Sequence[Pair], evaluator: Evaluator, name: str, placebos: Placebos
) -> tuple[pa.Table, list[float]]:
    """A shard's score table, row for row as its candidates, and the gains.

    All arms of the shard are one call of the evaluator, a pair's side by side, so that they may share its prompt.
    """
    columns = ["pair_id", "side", "worker", "settings_hash", "text"]
    rows = pq.read_table(path, columns=columns, use_threads=False).to_pylist()
    by_id = {pair.id: pair for pair in pairs}
    of_pair: dict[str, list[dict[str, Any]]] = {pair.id: [] for pair in pairs}
    for row in rows:
        if row["text"] is not None and row["side"] == "query":
            of_pair[row["pair_id"]].append(row)
    asked: dict[tuple[str, str | None], None] = {}
    for pair_id, candidates in of_pair.items():
        for row, placebo in zip(candidates, placebos.of(by_id[pair_id], candidates), strict=True):
            row["placebo"] = placebo
        texts = [row["text"] for row in candidates]
        texts += [row["placebo"] for row in candidates if row["placebo"] is not None]
        asked |= dict.fromkeys((pair_id, text) for text in (None, *texts))
    values = evaluator.score([by_id[pair_id] for pair_id, _ in asked], [text for _, text in asked])
    score_of = dict(zip(asked, values, strict=True))
    for (pair_id, text), value in score_of.items():
        if not math.isfinite(value):
            given = "without a rationale" if text is None else f"with the rationale {text[:60]!r}"
            raise ValueError(
                f"evaluator {name!r}: the score of the pair {pair_id!r} {given} is {value}, no finite number; "
                f"load its model in bfloat16 or float32"
            )

    def arm(key: str) -> pa.Array:
        """Scores of the texts in a field of the rows, null where there is none."""
        scores = [score_of[row["pair_id"], row[key]] if row.get(key) is not None else None for row in rows]
        return pa.array(scores, pa.float32())

    for row in rows:
        row["scored"] = row["text"] if row["side"] == "query" else None
    arms = {
        "pair_id": pa.array([row["pair_id"] for row in rows], pa.string()),
        f"{name}.candidate": arm("scored"),
        f"{name}.none": pa.array([score_of[row["pair_id"], None] for row in rows], pa.float32()),
        f"{name}.placebo": arm("placebo"),
    }
    distinct = {(pair_id, row["text"]) for pair_id, candidates in of_pair.items() for row in candidates}
    return pa.table(arms), [score_of[key] - score_of[key[0], None] for key in sorted(distinct)]
