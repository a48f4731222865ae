"""The files of a pool: manifest, shards and their schema, and functions that write them.

`mmemb.common.files` writes the files. A shard is whole or absent, even after a full disk or a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from mmemb.common.digests import digest, pair_digest
from mmemb.common.files import named_damage, remove_temporary, whole_file, write_text
from mmemb.data import bundled
from mmemb.types import Pair, Rationale

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
METADATA_KEY = b"mmemb.pool"
ROW_GROUP = 512
"""Rows that are decoded together. A look-up decodes one row group, and every row group adds to the footer."""
RATIONALE_COLUMNS = [entry.name for entry in fields(Rationale)]

Side: TypeAlias = Literal["query", "target"]
"""The item of a pair that a rationale is about. Its worker saw this item alone."""

CANDIDATE_SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "pair_hash": pa.string(),
        "task": pa.string(),
        "side": pa.string(),
        "worker": pa.string(),
        "model": pa.string(),
        "seed": pa.int64(),
        "settings": pa.string(),
        "settings_hash": pa.string(),
        "prompt_hash": pa.string(),
        "text": pa.string(),
        "tokens": pa.int32(),
        "finish_reason": pa.string(),
        "corruption": pa.string(),
        "leaks": pa.string(),
    }
)
"""Columns of a candidate.

- ``pair_id``, ``pair_hash``, ``task``: the pair, its digest and its task.
- ``side``: the item that the rationale is about (``query`` or ``target``).
- ``worker``, ``model``: the worker, its model and revision.
- ``settings``, ``settings_hash``: the worker's settings as JSON, sampling parameters included, and their digest.
- ``seed``, ``prompt_hash``: the seed of the sample and the digest of its prompt.
- ``text``, ``tokens``, ``finish_reason``: the rationale, its length in tokens, and why it ended.
- ``corruption``: how the text was damaged on purpose.
- ``leaks``: leak flags, joined by commas.
"""


@dataclass(frozen=True)
class Manifest:
    """Describes what a pool was made from.

    Attributes:
        data: digest of the pairs, in order.
        pairs: number of pairs.
        generation: settings of the workers, candidates per worker, seed, sides and leak check.
        evaluators: evaluator's name -> its settings, for each evaluator with scores in the pool.
        shard_size: pairs per shard.
        version: version of the pool format.
    """

    data: str
    pairs: int
    generation: Mapping[str, Any]
    evaluators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shard_size: int = 256
    version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Digest of everything that determines the content of the pool."""
        return digest([self.data, self.generation, self.evaluators])

    def starts(self) -> range:
        """Returns the number of the first pair of every shard."""
        return range(0, self.pairs, self.shard_size)

    def to_json(self) -> str:
        """Returns the manifest as stored. The hash is included for people to read."""
        return json.dumps({**asdict(self), "hash": self.hash}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, path: Path) -> Manifest:
        """Reads a manifest from the text that `to_json` returned.

        Raises:
            ValueError: the text is not a manifest, or has another version of the format.
        """
        try:
            stored = json.loads(text)
            stored.pop("hash", None)
            manifest = cls(**stored)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: is not the manifest of a rationale pool ({error}); make the pool again"
            ) from None
        if manifest.version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: has pool format {manifest.version}, but this version of mmemb reads {SCHEMA_VERSION}; make "
                f"the pool again under another path (`mmemb rationales generate`)"
            )
        return manifest


def data_digest(pairs: Sequence[Pair]) -> str:
    """Returns a digest of the pairs in order. Keeps only their digests in memory."""
    return digest([pair_digest(pair) for pair in pairs])


def resolve(path: str | Path) -> Path:
    """Returns the path of a pool on disk. ``bundled:pool`` is the pool inside the package."""
    text = str(path)
    if text.startswith("bundled:"):
        return Path(bundled.__file__).parent / f"{text.removeprefix('bundled:')}.parquet"
    return Path(text).expanduser()


def exists(path: str | Path) -> bool:
    """Whether there is a pool at the path, finished or not."""
    place = resolve(path)
    return place.is_file() or (place / MANIFEST).is_file()


def read_manifest(path: str | Path) -> Manifest:
    """Reads the manifest of a pool folder or file.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: the path has no pool, or a pool with another version of the format.
    """
    place = resolve(path)
    if place.is_file():
        with named_damage(place, "give the path of a rationale pool, or make one with `mmemb rationales generate`"):
            metadata = pq.read_schema(place).metadata or {}
        if METADATA_KEY not in metadata:
            raise ValueError(
                f"{place}: is a Parquet file but no rationale pool; make one with `mmemb rationales generate`"
            )
        return Manifest.from_json(metadata[METADATA_KEY], path=place)
    if not (place / MANIFEST).is_file():
        raise FileNotFoundError(f"{place}: there is no rationale pool here; make one with `mmemb rationales generate`")
    return Manifest.from_json((place / MANIFEST).read_bytes(), path=place / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all. Makes the folder if necessary."""
    write_text(folder / MANIFEST, manifest.to_json() + "\n")


def candidates_shard(folder: Path, start: int) -> Path:
    """Returns the path of the shard with the candidates of the pairs from number ``start`` on."""
    return folder / f"candidates-{start:09d}.parquet"


def scores_shard(folder: Path, evaluator: str, start: int) -> Path:
    """Returns the path of the shard with an evaluator's scores of the same rows."""
    return folder / f"scores-{evaluator}-{start:09d}.parquet"


def rescore(folder: Path, evaluator: str) -> str:
    """Returns advice for messages: how to make one evaluator's scores again and keep the candidates."""
    return (
        f"delete {folder / f'scores-{evaluator}-*.parquet'} and run `mmemb rationales score`: the candidates are kept"
    )


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes a table as a shard that is whole or absent, even after a full disk or a kill.

    Compresses with ``lz4``, which decodes in less than half the time of ``zstd``. A ``zstd`` file is a third smaller.
    """
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="lz4")


def write_file(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes tables one after the other into a single ``zstd`` file, whole or not at all.

    Args:
        path: the file.
        tables: the tables. Only a few row groups are in memory at a time.
        schema: schema of the tables, with the metadata of the file.
    """
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting = schema.empty_table()
        for table in tables:
            waiting = pa.concat_tables([waiting, table.cast(schema)])
            # All row groups must have the same size: a look-up computes the group from the row number.
            whole = len(waiting) - len(waiting) % ROW_GROUP
            if whole:
                writer.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
            waiting = waiting.slice(whole)
        writer.write_table(waiting)


@contextmanager
def sole_maker(folder: Path, shards: str = "candidates") -> Iterator[None]:
    """Takes a lock, so that no other process makes these shards inside the context.

    Two processes would mix their settings and remove each other's files. The system releases the lock when the process
    ends, even after a kill. Makes the folder if necessary.

    Raises:
        ValueError: another process is making these shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{shards}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another process is making {shards} here; wait until it has ended, or give another path"
        ) from None
    try:
        yield
    finally:
        lock.release()


def drop_partial(folder: Path, shards: str = "candidates") -> None:
    """Removes the unfinished files of a killed run: its manifest and the named shards. Call it in `sole_maker`."""
    for name in (f"{shards}-*", MANIFEST):
        remove_temporary(folder, name)


class Proposal(NamedTuple):
    """The proposal of a worker for one side of a pair: its settings as JSON, the rationales, their leak flags."""

    side: Side
    settings: str
    rationales: Sequence[Rationale]
    leaks: Sequence[tuple[str, ...]]


def candidate_rows(pair: Pair, proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    """Returns the rows of one pair, or a single row without a text if there is no rationale."""
    shared = {"pair_id": pair.id, "pair_hash": pair_digest(pair), "task": pair.task, "side": "query"}
    rows = [
        {
            **shared,
            **asdict(rationale),
            "side": proposal.side,
            "settings": proposal.settings,
            "settings_hash": digest(proposal.settings),
            "leaks": ",".join(flags),
        }
        for proposal in proposals
        for rationale, flags in zip(proposal.rationales, proposal.leaks, strict=True)
    ]
    return rows or [shared]


def rationale_of(row: Mapping[str, Any]) -> Rationale:
    """Returns the rationale of a stored row."""
    values = {name: row[name] for name in RATIONALE_COLUMNS}
    return Rationale(**{**values, "leaks": tuple(filter(None, row["leaks"].split(",")))})
