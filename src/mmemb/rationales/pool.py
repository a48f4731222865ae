"""The rationale pool: reads rationale candidates and their scores from Parquet files.

A pool is a folder while it grows. It may be exported to a single file for distribution::

    pool/manifest.json                        what the pool was made from: digests of data, workers, evaluators
    pool/candidates-000000000.parquet         one row per candidate, of the pairs from number 0 on
    pool/scores-retrieval-000000000.parquet   the scores of the same rows, one column per arm of the evaluator

Shards are written whole and never changed. Whatever exists is whole, and a stopped run continues at the first missing
shard. A pair for which no worker proposed a rationale has one row whose text is null.

Memory: an index of 20 bytes per pair, the most recently used row groups (at most 64 MiB), and the most recently used
files, memory-mapped. Rows become Python objects only when a caller asks for them. `benchmarks/pool.py` measures this.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmemb.common.digests import digest, pair_digest
from mmemb.rationales.index import PairIndex
from mmemb.rationales.storage import (
    CANDIDATE_SCHEMA,
    METADATA_KEY,
    RATIONALE_COLUMNS,
    Side,
    rationale_of,
    read_manifest,
    rescore,
    resolve,
    write_file,
)
from mmemb.types import Candidates, Pair

_CACHE_BYTES = 64 * 2**20
_OPEN_FILES = 128
_INDEX_ROWS = 65536
_ARMS = ("candidate", "none", "placebo")
_LOOKUP_COLUMNS = ["pair_id", "pair_hash", "side", "settings_hash", *RATIONALE_COLUMNS]


def scored(candidates: Candidates) -> tuple[float, ...]:
    """Returns the candidates' scores, for a selector that needs them.

    Raises:
        ValueError: the pool has not been scored, or a score is nan.
    """
    missing = len(candidates.scores) != len(candidates.rationales) or any(map(math.isnan, candidates.scores))
    if candidates.rationales and (missing or math.isnan(candidates.score_none)):
        raise ValueError(
            f"pair {candidates.pair_id!r}: its rationale candidates have not been scored; "
            f"run `mmemb rationales score` with the same --config first, or use the selector `random`"
        )
    return candidates.scores


@dataclass(frozen=True)
class _Part:
    """A file of candidates and the file of their scores: the same one in a single-file pool, None if not scored."""

    candidates: Path
    scores: Path | None


class RationalePool:
    """A pool opened for reading by `open`. Safe in forked and in spawned data-loader workers.

    Attributes:
        path: the folder or file.
        manifest: what the pool was made from.
        evaluator: name of the evaluator whose scores `candidates` returns. None if no evaluator has scored the pool.
        keep_leaks: whether `candidates` also returns those with leak flags.
    """

    def __init__(self, path: str | Path, *, evaluator: str | None = None, keep_leaks: bool = False) -> None:
        self.path = resolve(path)
        self.manifest = read_manifest(path)
        self.keep_leaks = keep_leaks
        names = sorted(self.manifest.evaluators)
        if evaluator is not None and evaluator not in names:
            raise ValueError(
                f"{self.path}: has no scores by the evaluator {evaluator!r}, only by: {', '.join(names) or 'none'}; "
                f"run `mmemb rationales score` with the same --config first"
            )
        self.evaluator = evaluator if evaluator is not None else next(iter(names), None)
        self._parts = self._find_parts()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._cached = 0  # bytes of the cached row groups
        self._index = PairIndex(
            (number, *runs) for number in range(len(self._parts)) for runs in self._pair_runs(number)
        )

    @classmethod
    def open(cls, path: str | Path, *, evaluator: str | None = None, keep_leaks: bool = False) -> RationalePool:
        """Opens a folder, a ``.parquet`` file or ``bundled:pool``.

        Args:
            path: where the pool is.
            evaluator: name of the evaluator whose scores to read. None means the first in the order of names.
            keep_leaks: whether `candidates` also returns those with leak flags.

        Raises:
            FileNotFoundError: there is no pool.
            ValueError: the path has no pool, the pool has another version of the format, or that evaluator has not
                scored it.
        """
        return cls(path, evaluator=evaluator, keep_leaks=keep_leaks)

    def __reduce__(self) -> tuple[Any, ...]:
        # A data-loader worker opens the files itself: file handles and caches are not sent to it.
        return _reopen, (str(self.path), self.evaluator, self.keep_leaks)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Yields the pair ids in the order of the data, and reads them as needed."""
        for number in range(len(self._parts)):
            for ids, _, _ in self._pair_runs(number):
                yield from ids

    def __contains__(self, pair_id: object) -> bool:
        return isinstance(pair_id, str) and bool(self._pieces(pair_id))

    @property
    def pair_ids(self) -> list[str]:
        """All pair ids in the order of the data, as a list. For millions of pairs, iterate over the pool instead."""
        return list(self)

    @property
    def complete(self) -> bool:
        """Whether the pool has every pair and the evaluator, if there is one, has scored them all."""
        found = len(self) == self.manifest.pairs
        return found and all(part.scores is not None for part in self._parts if self.evaluator is not None)

    def check_complete(self, purpose: str) -> None:
        """Refuses a pool that a stopped run has left unfinished. Looks at the index and at file names only.

        Args:
            purpose: end of the message, such as "before the pool is exported".

        Raises:
            ValueError: pairs have no candidates, or the evaluator has not scored them all.
        """
        pairs = self.manifest.pairs
        if len(self) != pairs:
            raise ValueError(
                f"{self.path}: {len(self)} of {pairs} pairs have their candidates; finish `mmemb rationales generate` "
                f"with the configuration that started it {purpose}"
            )
        if not self.complete:
            numbers = [number for number, part in enumerate(self._parts) if part.scores is not None]
            scored_pairs = sum(min(self.manifest.shard_size, pairs - self.manifest.starts()[each]) for each in numbers)
            raise ValueError(
                f"{self.path}: {scored_pairs} of {pairs} pairs have scores by {self.evaluator!r}; finish "
                f"`mmemb rationales score` with the configuration that started it {purpose}"
            )

    def candidates(self, pair_id: str, *, side: Side = "query") -> Candidates:
        """Returns the candidates for one side of a pair with their scores. A missing score is nan.

        Raises:
            ValueError: the pool does not have the pair.
        """
        rows = self._rows(pair_id).to_pylist()
        kept = self._kept(rows, side)
        candidate, none, placebo = (f"{self.evaluator}.{arm}" for arm in _ARMS)
        return Candidates(
            pair_id=pair_id,
            rationales=tuple(rationale_of(row) for row in kept),
            scores=tuple(_number(row.get(candidate)) for row in kept),
            score_none=next((row[none] for row in rows if row.get(none) is not None), math.nan),
            scores_placebo=tuple(_number(row[placebo]) for row in kept if placebo in row),
        )

    def settings_hashes(self, pair_id: str, *, side: Side = "query") -> tuple[str, ...]:
        """Returns the digest of the worker's settings for each of `candidates`. Empty strings if it is not stored."""
        return tuple(row["settings_hash"] for row in self._kept(self._rows(pair_id).to_pylist(), side))

    def _kept(self, rows: Sequence[dict[str, Any]], side: Side) -> list[dict[str, Any]]:
        """Returns the rows that are candidates of a side, without leaks unless `keep_leaks`."""
        return [
            row
            for row in rows
            if row["text"] is not None and row["side"] == side and (self.keep_leaks or not row["leaks"])
        ]

    def check(
        self,
        pairs: Sequence[Pair],
        *,
        generation: Mapping[str, Any] | None = None,
        evaluator: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuses a pool that was made from other pairs or settings than those of a run.

        Args:
            pairs: the pairs of the run. The pool may have more, and in another order.
            generation: settings of the workers, k and seed, as in the manifest. None accepts any.
            evaluator: settings of the evaluator whose scores are open. None accepts any.

        Raises:
            ValueError: a pair is missing, a pair has changed since the pool was made, or workers or evaluator had other
                settings.
        """
        remedy = "make the pool again under another path (`mmemb rationales generate`), or delete it"
        scoring = self.manifest.evaluators.get(self.evaluator or "", {})
        scores = "" if self.path.is_file() else f", or {rescore(self.path, self.evaluator or '')}"
        for what, stored, wanted, way_out in (
            ("made by workers", self.manifest.generation, generation, remedy),
            ("scored by an evaluator", scoring, evaluator, remedy + scores),
        ):
            if wanted is not None and digest(stored) != digest(wanted):
                raise ValueError(
                    f"{self.path}: {what} with other settings (hash {digest(stored)}, this run needs "
                    f"{digest(wanted)}; different: {_differences(stored, wanted)}); {way_out}"
                )
        hashes = [pair_digest(pair) for pair in pairs]
        if digest(hashes) == self.manifest.data:
            return
        other = f"{self.path}: made from other data (hash {self.manifest.data}, this run needs {digest(hashes)}):"
        for pair, asked in zip(pairs, hashes, strict=True):
            if pair.id not in self:
                raise ValueError(f"{other} it has no pair {pair.id!r}; {remedy}")
            there = self._rows(pair.id)["pair_hash"][0].as_py()
            if there != asked:
                raise ValueError(f"{other} the pair {pair.id!r} has changed (hash {there}, now {asked}); {remedy}")

    def export(self, path: str | Path) -> Path:
        """Writes the pool, the open evaluator's scores and the manifest into one Parquet file. Returns its path.

        Candidates with leak flags are written too.

        Raises:
            ValueError: candidates are missing, or the evaluator has not scored them all. A single file cannot be
                continued later.
        """
        self.check_complete("before the pool is exported")
        target = resolve(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        evaluators = {name: value for name, value in self.manifest.evaluators.items() if name == self.evaluator}
        manifest = replace(self.manifest, evaluators=evaluators)
        schema = self._read(0).schema if self._parts else CANDIDATE_SCHEMA
        tables = (self._read(number) for number in range(len(self._parts)))
        write_file(target, tables, schema.with_metadata({METADATA_KEY: manifest.to_json().encode()}))
        return target

    def _find_parts(self) -> list[_Part]:
        if self.path.is_file():
            return [_Part(self.path, self.path if self.evaluator else None)]
        parts = []
        for shard in sorted(self.path.glob("candidates-*.parquet")):
            scores = shard.with_name(shard.name.replace("candidates-", f"scores-{self.evaluator}-", 1))
            parts.append(_Part(shard, scores if scores.is_file() else None))
        return parts

    def _pair_runs(self, number: int) -> Iterator[tuple[list[str], NDArray[np.int32], NDArray[np.int32]]]:
        """Yields ids, first rows and row counts of the pairs of a part, in stored order, `_INDEX_ROWS` rows each."""
        file = self._open_file(self._parts[number].candidates)
        row = 0  # row of the part at which the piece begins
        left: list[str] = []  # the last pair's rows so far: the next piece may have more of them
        for batch in file.iter_batches(_INDEX_ROWS, columns=["pair_id"], use_threads=False):
            ids = pa.concat_arrays([pa.array(left, pa.string()), batch["pair_id"]])
            runs = pc.run_end_encode(ids, run_end_type=pa.int32())
            ends, names = runs.run_ends.to_numpy(), runs.values.to_pylist()
            counts = np.diff(ends, prepend=np.int32(0))
            firsts = ends - counts + np.int32(row)
            yield names[:-1], firsts[:-1], counts[:-1]
            row, left = int(firsts[-1]), names[-1:] * int(counts[-1])
        if left:
            yield left[:1], np.array([row], np.int32), np.array([len(left)], np.int32)

    def _rows(self, pair_id: str) -> pa.Table:
        """Returns the rows of a pair."""
        pieces = self._pieces(pair_id)
        if not pieces:
            raise ValueError(f"{self.path}: has no pair {pair_id!r} among its {len(self)}; make a pool from this data")
        return pa.concat_tables(pieces)

    def _pieces(self, pair_id: str) -> list[pa.Table]:
        """Returns the rows of a pair from the row groups that contain them. Empty if there is no such pair."""
        pieces = []
        for part, first, count in self._index.runs(pair_id):
            size = self._open_file(self._parts[part].candidates).metadata.row_group(0).num_rows
            while count:
                group, offset = divmod(first, size)
                piece = self._group(part, group).slice(offset, count)
                if piece["pair_id"][0].as_py() != pair_id:  # another pair with the same hash
                    break
                pieces.append(piece)
                first, count = first + len(piece), count - len(piece)
        return pieces

    def _group(self, number: int, group: int) -> pa.Table:
        """Returns a decoded row group, from the cache if possible."""
        key = (number, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._groups[key] = self._read(number, group)
        self._cached += table.nbytes
        while self._cached > _CACHE_BYTES and len(self._groups) > 1:
            self._cached -= self._groups.popitem(last=False)[1].nbytes
        return table

    def _read(self, number: int, group: int | None = None) -> pa.Table:
        """Reads candidates and scores of a part: the whole part, or one row group with the columns of a look-up.

        A part that is not scored has no score columns.
        """
        part = self._parts[number]
        table = self._columns(part.candidates, CANDIDATE_SCHEMA.names if group is None else _LOOKUP_COLUMNS, group)
        if part.scores:
            arms = self._columns(part.scores, [f"{self.evaluator}.{arm}" for arm in _ARMS], group)
            for arm in arms.column_names:
                table = table.append_column(arm, arms[arm])
        return table

    def _columns(self, path: Path, columns: list[str], group: int | None) -> pa.Table:
        """Reads those of the columns that the file has. Evaluators differ in their arms."""
        file = self._open_file(path)
        there = set(file.schema_arrow.names)
        columns = [name for name in columns if name in there]
        # No threads: a forked data-loader worker would wait forever for a thread pool that was not forked with it.
        if group is None:
            return file.read(columns, use_threads=False)
        return file.read_row_group(group, columns, use_threads=False)

    def _open_file(self, path: Path) -> pq.ParquetFile:
        """Opens a file, or returns it if it is open.

        Keeps few files open: a pool may have more shards than a process may open files.
        """
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        file = self._files[path] = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close(force=True)
        return file


def _reopen(path: str, evaluator: str | None, keep_leaks: bool) -> RationalePool:
    return RationalePool.open(path, evaluator=evaluator, keep_leaks=keep_leaks)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    return ", ".join(key for key in sorted({*stored, *asked}) if digest(stored.get(key)) != digest(asked.get(key)))
