"""A corpus to one Parquet file, by any number of processes, in parts that survive an interruption.

Items are cut into parts of equal size; rank r of W embeds parts r, r + W, ... and writes each, whole or not at all,
into ``<output>.parts/``. A process that finds all parts there joins them into the output, in the items' order, and
removes the folder. So a run that was killed continues with the parts that are missing, under any number of processes.
Ranks need no channel but the folder, and the output is whole or absent. At most one part per process is lost.

``job.json`` in the folder keeps what determines the embeddings; parts of another job are refused, never mixed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmemb.common import terminal
from mmemb.common.digests import digest, item_digest
from mmemb.common.files import whole_file, write_text
from mmemb.inference.embedder import Embedder
from mmemb.inference.embedding_files import embedding_table
from mmemb.types import Item

_JOB = "job.json"


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``) or SLURM's ``srun`` says; alone without either."""
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            values = [os.environ.get(name) for name in names]
            if values[0] is not None and values[1] is not None:
                return cls(int(values[0]), int(values[1]), int(values[2] or 0))
        return cls()


@dataclass(frozen=True)
class Share:
    """What one process did.

    Attributes:
        embedded: rows embedded now.
        thought: rows thought about among them.
        found: rows of its share that an earlier run had left.
        joined: whether the output is in place.
    """

    embedded: int
    thought: int
    found: int
    joined: bool


def embed_to_parquet(
    embedder: Embedder,
    items: Sequence[Item],
    output: str | Path,
    *,
    ranks: Ranks | None = None,
    part_rows: int = 1024,
    options: Mapping[str, Any] | None = None,
) -> Share:
    """Embeds this process's share of the items and, once every share is there, writes the output.

    Args:
        embedder: the model.
        items: all M items, the same in every process.
        output: the Parquet file; `mmemb.search.exact` has its columns.
        ranks: which process this is; None: the only one.
        part_rows: rows of a part.
        options: further arguments of `Embedder.encode`, JSON-ready.

    Raises:
        ValueError: the folder of the parts holds those of another job.
    """
    ranks, options, output = ranks or Ranks(), dict(options or {}), Path(output)
    folder = output.with_name(f"{output.name}.parts")
    parts = -(-len(items) // part_rows)
    if parts <= ranks.rank:  # nothing to do, and the others may have joined the parts and removed their folder already
        return Share(0, 0, 0, output.is_file() and not folder.exists())
    _claim(folder, _job(embedder, items, part_rows, options))
    mine = range(ranks.rank, parts, ranks.world_size)
    missing = [number for number in mine if not _part(folder, number).is_file()]
    total, todo = (sum(len(_rows(items, number, part_rows)) for number in numbers) for numbers in (mine, missing))
    found, embedded, thought = total - todo, 0, 0
    shown = terminal.progress("embed", total, unit="items", done=found, show=embedder.encoder.progress)
    try:
        with shown as bar:
            for number in missing:
                rows = _rows(items, number, part_rows)
                encoded = embedder.encode(list(rows), return_rationales=True, **options)
                names = [item.fields.get("id", str(number * part_rows + row)) for row, item in enumerate(rows)]
                table = embedding_table(rows, encoded, ids=names, model=embedder.identity)
                with whole_file(_part(folder, number)) as temporary:
                    pq.write_table(table, temporary, compression="zstd")
                embedded += len(rows)
                thought += int(encoded.thought.sum())
                bar.advance(len(rows))
    except BaseException:
        if ranks.world_size == 1 and not any(folder.glob("*.parquet")):
            shutil.rmtree(folder, ignore_errors=True)  # nothing to go on from
        raise
    return Share(embedded, thought, found, _join(folder, parts, output))


def _rows(items: Sequence[Item], number: int, part_rows: int) -> Sequence[Item]:
    """The items of a part."""
    return items[number * part_rows : (number + 1) * part_rows]


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:07}.parquet"


def _job(embedder: Embedder, items: Sequence[Item], part_rows: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that determines the parts, in words where it is short."""
    contents = digest([[item.fields.get("id", ""), item_digest(item)] for item in items])
    settings = {"budget": embedder.encoder.budget, **options}
    if options.get("side") == "query" and options.get("reason", "auto") == "auto":
        settings["offset"] = getattr(embedder.controller, "offset", None)
    return {"model": embedder.identity, "rows": len(items), "items": contents, "part_rows": part_rows, **settings}


def _claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Makes the folder, or sees that it is this job's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _JOB
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*job, *there} if job.get(key) != there.get(key))
        if differing:
            raise ValueError(
                f"{folder}: holds parts of an interrupted run with other {', '.join(differing)}; remove the folder to "
                "start anew, or give another --output"
            )
        return
    write_text(path, json.dumps(job, indent=2) + "\n")


def _join(folder: Path, parts: int, output: Path) -> bool:
    """Joins the parts if all are there. Several processes may do so at once: each writes the same file."""
    files = [_part(folder, number) for number in range(parts)]
    if not all(file.is_file() for file in files):
        return output.is_file() and not folder.exists()  # not yet; or another process has just done it
    try:
        with (
            whole_file(output) as temporary,
            pq.ParquetWriter(temporary, pq.read_schema(files[0]), compression="zstd") as writer,
        ):
            for file in files:
                writer.write_table(pq.read_table(file))
    except FileNotFoundError:  # another process has joined them and removed the folder
        if not output.is_file():
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return True
