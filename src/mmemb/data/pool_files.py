"""What a pool consists of on disk: manifest, shards and their schema, and how they are written.

Files are written aside and renamed: a shard is whole or absent, also after a full disk or a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmemb.digests import digest, pair_digest
from mmemb.types import Pair, Rationale

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"mmemb.pool"
ROW_GROUP = 512
_TEMPORARY = ".partial"

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
        "text": pa.string(),
        "tokens": pa.int32(),
        "finish_reason": pa.string(),
    }
)
"""Columns of a candidate: the pair and its digest, whose rationale it is (``query``), the worker's settings (JSON) and
their digest, the rationale."""


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
                f"{path}: pool format {manifest.version}, this version reads {SCHEMA_VERSION}; make the pool anew "
                f"(`mmemb rationales generate`) under another path"
            )
        return manifest


def data_digest(pairs: Sequence[Pair]) -> str:
    """Digest of pairs in order, without holding more than their digests."""
    return digest([pair_digest(pair) for pair in pairs])


def resolve(path: str | Path) -> Path:
    """The pool's place on disk: ``bundled:pool`` is the one inside the package, anything else a path."""
    text = str(path)
    if text.startswith("bundled:"):
        return Path(__file__).parent / "bundled" / f"{text.removeprefix('bundled:')}.parquet"
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
        try:
            metadata = pq.read_schema(place).metadata or {}
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place}: not a Parquet file ({error})") from None
        if METADATA_KEY not in metadata:
            raise ValueError(f"{place}: a Parquet file but no rationale pool; make one by `mmemb rationales generate`")
        return Manifest.from_json(metadata[METADATA_KEY], path=place)
    if not (place / MANIFEST).is_file():
        raise FileNotFoundError(f"{place}: no rationale pool here; make one by `mmemb rationales generate`")
    return Manifest.from_json((place / MANIFEST).read_bytes(), path=place / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it aside and renames it; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MANIFEST}.{os.getpid()}{_TEMPORARY}"
    temporary.write_text(manifest.to_json() + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def candidates_shard(folder: Path, start: int) -> Path:
    """Path of the candidates of the pairs from number ``start`` on."""
    return folder / f"candidates-{start:09d}.parquet"


def scores_shard(folder: Path, evaluator: str, start: int) -> Path:
    """Path of an evaluator's scores of the same rows."""
    return folder / f"scores-{evaluator}-{start:09d}.parquet"


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes a table aside and renames it: the shard is whole or absent, also after a full disk or a kill."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def candidate_rows(pair: Pair, proposals: Sequence[tuple[str, Sequence[Rationale]]]) -> list[dict[str, Any]]:
    """The rows of one pair.

    Args:
        pair: the pair.
        proposals: each worker's settings as JSON, and what it proposed.
    """
    shared = {"pair_id": pair.id, "pair_hash": pair_digest(pair), "task": pair.task, "side": "query"}
    rows = [
        {
            **shared,
            "settings": settings,
            "settings_hash": digest(settings),
            **{key: value for key, value in asdict(rationale).items() if key in CANDIDATE_SCHEMA.names},
        }
        for settings, rationales in proposals
        for rationale in rationales
    ]
    return rows or [shared]
