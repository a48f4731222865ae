"""What a pool consists of on disk: manifest, shards and their schema, and how they are written.

Files are written by `mmemb.common.files`: a shard is whole or absent, also after a full disk or a kill.
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
"""Rows decoded together: a look-up decodes one group, and every group costs its footer."""
RATIONALE_COLUMNS = [entry.name for entry in fields(Rationale)]

Side: TypeAlias = Literal["query", "target"]
"""Which item of a pair a rationale thinks about: its worker was shown that one alone."""

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
"""Columns of a candidate: the pair and its digest; the side it thinks about (``query`` or ``target``); the worker, its
model and revision, its settings (sampling parameters included, as JSON) with their digest, the sample's seed and the
digest of its prompt; the text, its length in tokens, why it ended; how it was damaged on purpose; leak flags, joined by
commas."""


@dataclass(frozen=True)
class Manifest:
    """What a pool was made from.

    Attributes:
        data: digest of the pairs, in order.
        pairs: how many.
        generation: workers' settings, candidates a worker and seed.
        evaluators: settings of each evaluator whose scores are there, by name.
        shard_size: pairs a shard.
        version: of this format.
    """

    data: str
    pairs: int
    generation: Mapping[str, Any]
    evaluators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shard_size: int = 256
    version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Digest of all that determines the pool's content."""
        return digest([self.data, self.generation, self.evaluators])

    def starts(self) -> range:
        """Number of the first pair of every shard."""
        return range(0, self.pairs, self.shard_size)

    def to_json(self) -> str:
        """As stored, the hash included for people to read."""
        return json.dumps({**asdict(self), "hash": self.hash}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, *, path: Path) -> Manifest:
        """Reads it back.

        Raises:
            ValueError: not a manifest, or one of another version of the format.
        """
        try:
            stored = json.loads(text)
            stored.pop("hash", None)
            manifest = cls(**stored)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a rationale pool's manifest ({error}); make the pool anew") from None
        if manifest.version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: pool format {manifest.version}, but this version of mmemb reads {SCHEMA_VERSION}; generate "
                f"the pool again under another path (`mmemb rationales generate`)"
            )
        return manifest


def data_digest(pairs: Sequence[Pair]) -> str:
    """Digest of pairs in order, without holding more than their digests."""
    return digest([pair_digest(pair) for pair in pairs])


def resolve(path: str | Path) -> Path:
    """The pool's place on disk: ``bundled:pool`` is the one inside the package, anything else a path."""
    text = str(path)
    if text.startswith("bundled:"):
        return Path(bundled.__file__).parent / f"{text.removeprefix('bundled:')}.parquet"
    return Path(text).expanduser()


def exists(path: str | Path) -> bool:
    """Whether there is a pool, finished or not."""
    place = resolve(path)
    return place.is_file() or (place / MANIFEST).is_file()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a pool folder or file.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: it is no pool, or of another version of the format.
    """
    place = resolve(path)
    if place.is_file():
        with named_damage(place, "name a rationale pool, or make one by `mmemb rationales generate`"):
            metadata = pq.read_schema(place).metadata or {}
        if METADATA_KEY not in metadata:
            raise ValueError(f"{place}: a Parquet file but no rationale pool; make one by `mmemb rationales generate`")
        return Manifest.from_json(metadata[METADATA_KEY], path=place)
    if not (place / MANIFEST).is_file():
        raise FileNotFoundError(f"{place}: no rationale pool here; make one by `mmemb rationales generate`")
    return Manifest.from_json((place / MANIFEST).read_bytes(), path=place / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all; makes the folder."""
    write_text(folder / MANIFEST, manifest.to_json() + "\n")


def candidates_shard(folder: Path, start: int) -> Path:
    """Path of the candidates of the pairs from number ``start`` on."""
    return folder / f"candidates-{start:09d}.parquet"


def scores_shard(folder: Path, evaluator: str, start: int) -> Path:
    """Path of an evaluator's scores of the same rows."""
    return folder / f"scores-{evaluator}-{start:09d}.parquet"


def rescore(folder: Path, evaluator: str) -> str:
    """How one evaluator's scores are made anew with the candidates kept, for messages."""
    return (
        f"delete {folder / f'scores-{evaluator}-*.parquet'} and run `mmemb rationales score`: the candidates are kept"
    )


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes a table as a shard: whole or absent, also after a full disk or a kill.

    Compressed by ``lz4``, which decodes in less than half the time of ``zstd``. A file of ``zstd`` is a third smaller.
    """
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="lz4")


def write_file(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes tables one after the other into a single file, by ``zstd``, whole or not at all.

    Args:
        path: the file.
        tables: their rows, of which a few groups are held at a time.
        schema: theirs, with the file's metadata.
    """
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        waiting = schema.empty_table()
        for table in tables:
            waiting = pa.concat_tables([waiting, table.cast(schema)])
            # Groups of one size: a look-up counts on it.
            whole = len(waiting) - len(waiting) % ROW_GROUP
            if whole:
                writer.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
            waiting = waiting.slice(whole)
        writer.write_table(waiting)


@contextmanager
def sole_maker(folder: Path, shards: str = "candidates") -> Iterator[None]:
    """Inside, no other process makes these shards: two would mix their settings and take each other's files away.

    The system lets go of the lock when a process ends, however it does. Makes the folder.

    Raises:
        ValueError: another process makes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{shards}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another process is making {shards} here; wait until it has ended, or name another path"
        ) from None
    try:
        yield
    finally:
        lock.release()


def drop_partial(folder: Path, shards: str = "candidates") -> None:
    """Removes what a killed run was writing: the manifest, and shards whose names begin so. Call it in `sole_maker`."""
    for name in (f"{shards}-*", MANIFEST):
        remove_temporary(folder, name)


class Proposal(NamedTuple):
    """What a worker proposed for one side of a pair: its settings as JSON, the rationales, their leak flags."""

    side: Side
    settings: str
    rationales: Sequence[Rationale]
    leaks: Sequence[tuple[str, ...]]


def candidate_rows(pair: Pair, proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    """The rows of one pair; a single one without a text where nobody had a word for it."""
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
    """The rationale of a stored row."""
    values = {name: row[name] for name in RATIONALE_COLUMNS}
    return Rationale(**{**values, "leaks": tuple(filter(None, row["leaks"].split(",")))})
