"""Scores rationale candidates (stage 1, pair-aware selection).

For each pair, an evaluator compares the confidence with a candidate and the confidence without a rationale. A selector
later chooses by this gain, which is from the paper:

    gain(r) = c(q, t | do(r)) - c(q, t | do(none))

There are three arms: *none*, *candidate* and *placebo* (for each candidate a rationale of another pair, see
`mmemb.rationales.placebo`). They are scored once, shard by shard as in `mmemb.rationales.generate`, and kept in the
pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmemb.common import terminal
from mmemb.common.digests import digest
from mmemb.interfaces import Evaluator, Model, SetupContext
from mmemb.rationales.placebo import Placebos
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.storage import (
    Manifest,
    candidates_shard,
    data_digest,
    drop_partial,
    read_manifest,
    rescore,
    resolve,
    scores_shard,
    sole_maker,
    write_manifest,
    write_shard,
)
from mmemb.types import Pair


def evaluator_name(evaluator: Evaluator) -> str:
    """Returns the name of the evaluator's columns: its short name, or else the name of its class."""
    return evaluator.name or type(evaluator).__qualname__


def score(
    pairs: Sequence[Pair],
    evaluator: Evaluator,
    pool: str | Path,
    *,
    model: Model | None = None,
    progress: bool = True,
) -> RationalePool:
    """Scores the candidates of a pool. Continues unfinished scores.

    Equal texts of a pair are scored once. The arms of a pair are scored together, so that they may share their prompt.

    Args:
        pairs: the pairs that the pool was made from. The evaluator takes its negatives from them.
        evaluator: computes the confidence of a pair with and without a rationale.
        pool: the folder of a pool that has all its candidates.
        model: the model in training, for an evaluator that uses it.
        progress: whether to report progress, and a one-line summary at the end.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: the pool was made from other data, has missing candidates or is read-only. Or it has scores by this
            evaluator with other settings, another process is scoring it by this evaluator, or a score is not finite.
    """
    evaluator.setup(SetupContext(model=model))
    folder, name, settings = resolve(pool), evaluator_name(evaluator), evaluator.settings
    manifest = read_manifest(pool)
    asked = data_digest(pairs)
    if manifest.data != asked:
        raise ValueError(
            f"{folder}: made from other data (hash {manifest.data}, this run needs {asked}); "
            f"give the same data, or make the pool again under another path"
        )
    if folder.is_file():
        if name not in manifest.evaluators:
            raise ValueError(
                f"{folder}: has no scores by {name!r}, and a single-file pool is read-only; give the folder of a pool"
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
        _fill(folder, pairs, evaluator, settings, model, progress)
    return RationalePool.open(pool, evaluator=name)


def _fill(
    folder: Path,
    pairs: Sequence[Pair],
    evaluator: Evaluator,
    settings: Mapping[str, Any],
    model: Model | None,
    progress: bool,
) -> None:
    """Makes the missing shards of scores."""
    name = evaluator_name(evaluator)
    drop_partial(folder, f"scores-{name}")
    manifest = read_manifest(folder)  # read again: the run of another evaluator may have added its settings since
    _check_settings(manifest, folder, name, settings)
    # Settings are written before the first score, so that there are never scores without settings.
    write_manifest(folder, replace(manifest, evaluators={**manifest.evaluators, name: settings}))
    missing = [start for start in manifest.starts() if not scores_shard(folder, name, start).is_file()]
    done = len(pairs) - sum(len(pairs[start : start + manifest.shard_size]) for start in missing)
    scored = helping = 0
    total_gain = 0.0
    placebos = Placebos({}, {})
    if missing:
        evaluator.setup(SetupContext(model=model, pairs=pairs))
        placebos = Placebos.collect([candidates_shard(folder, start) for start in manifest.starts()], pairs)
    with terminal.progress("score rationales", len(pairs), unit="pairs", done=done, show=progress) as bar:
        for start in missing:
            shard = pairs[start : start + manifest.shard_size]
            table, of_shard = _score_shard(candidates_shard(folder, start), shard, evaluator, name, placebos)
            write_shard(scores_shard(folder, name, start), table)
            scored += len(of_shard)
            helping += sum(gain > 0 for gain in of_shard)
            total_gain += math.fsum(of_shard)
            bar.advance(len(shard))
    if progress:
        worth = ""
        if scored:
            worth = f", mean gain {total_gain / scored:+.3f} nats, {helping / scored:.0%} have a positive gain"
        terminal.say(
            f"{folder}: {name} scored {scored} candidates{worth}; {done} of {len(pairs)} pairs already had their scores"
        )


def _check_settings(manifest: Manifest, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Refuses existing scores that were made with other settings or with unknown settings.

    Ignores settings left by a run that stopped before it wrote a score.
    """
    if folder.is_dir() and not any(scores_shard(folder, name, start).is_file() for start in manifest.starts()):
        return
    if name not in manifest.evaluators:
        raise ValueError(
            f"{folder}: has scores by {name!r}, but its manifest does not have their settings; " + rescore(folder, name)
        )
    there, asked = digest(manifest.evaluators[name]), digest(settings)
    if there != asked:
        raise ValueError(
            f"{folder}: scored by {name!r} with other settings (hash {there}, this run needs {asked}); "
            + ("give a folder as the path to make the pool again" if folder.is_file() else rescore(folder, name))
        )


def _score_shard(
    path: Path, pairs: Sequence[Pair], evaluator: Evaluator, name: str, placebos: Placebos
) -> tuple[pa.Table, list[float]]:
    """Scores a shard. Returns the table of its scores, in the order of its candidates' rows, and the gains.

    The evaluator is called once for all arms of the shard. The arms of a pair follow each other, so that they may share
    the prompt of the pair.
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
                f"evaluator {name!r}: the score of the pair {pair_id!r} {given} is {value}, not a finite number; "
                f"load its model in bfloat16 or float32"
            )

    def arm(key: str) -> pa.Array:
        """Returns the scores of the texts in a field of the rows, null where there is no text."""
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
