"""Embeds a corpus into one Parquet file, with any number of processes and in parts that survive an interruption.

Items are cut into parts of equal size. Rank r of W embeds parts r, r + W, ... and writes them into
``<output>.parts/``. A part appears there only when it is complete. A process that finds all parts there joins them into
the output, in the order of the items, and removes the folder. A run that was killed continues with the missing parts,
with any number of processes. At most one part per process is lost. Ranks communicate only through the folder, and the
output appears only when it is complete.

``job.json`` in the folder keeps everything that determines the embeddings. Parts of another job are refused and never
mixed in.
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
    """The rank of this process among several processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads the variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``) or of SLURM's ``srun``.

        Without either, this process is the only one.
        """
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
            values = [os.environ.get(name) for name in names]
            if values[0] is not None and values[1] is not None:
                return cls(int(values[0]), int(values[1]), int(values[2] or 0))
        return cls()


@dataclass(frozen=True)
class Share:
    """The work that one process did.

    Attributes:
        embedded: number of rows that this run embedded.
        thought: number of those rows for which the model reasoned.
        found: number of rows of its share that an earlier run had finished.
        joined: whether the output file exists.
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
    """Embeds this process's share of the items. Writes the output once every share is complete.

    Args:
        embedder: the model.
        items: all M items, the same in every process.
        output: the Parquet file. `mmemb.search.exact` describes its columns.
        ranks: the rank of this process. None: it is the only one.
        part_rows: number of rows per part.
        options: further arguments of `Embedder.encode`, ready for JSON.

    Raises:
        ValueError: the folder of the parts has parts of another job.
    """
    ranks, options, output = ranks or Ranks(), dict(options or {}), Path(output)
    folder = output.with_name(f"{output.name}.parts")
    parts = -(-len(items) // part_rows)
    if (
        parts <= ranks.rank
    ):  # nothing to do: the other processes may have joined the parts and removed the folder already
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
            shutil.rmtree(folder, ignore_errors=True)  # there is nothing to continue from
        raise
    return Share(embedded, thought, found, _join(folder, parts, output))


def _rows(items: Sequence[Item], number: int, part_rows: int) -> Sequence[Item]:
    """Returns the items of a part."""
    return items[number * part_rows : (number + 1) * part_rows]


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:07}.parquet"


def _job(embedder: Embedder, items: Sequence[Item], part_rows: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Collects everything that determines the parts. Long content is replaced by a digest."""
    contents = digest([[item.fields.get("id", ""), item_digest(item)] for item in items])
    settings = {"budget": embedder.encoder.budget, **options}
    if options.get("side") == "query" and options.get("reason", "auto") == "auto":
        settings["offset"] = getattr(embedder.controller, "offset", None)
    return {"model": embedder.identity, "rows": len(items), "items": contents, "part_rows": part_rows, **settings}


def _claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Creates the folder, or checks that the existing one belongs to this job."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _JOB
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*job, *there} if job.get(key) != there.get(key))
        if differing:
            raise ValueError(
                f"{folder}: it has parts of an interrupted run with other {', '.join(differing)}; remove the folder to "
                "start again, or give another --output"
            )
        return
    write_text(path, json.dumps(job, indent=2) + "\n")


def _join(folder: Path, parts: int, output: Path) -> bool:
    """Joins the parts if all are there. Several processes may do this at once, because each writes the same file."""
    files = [_part(folder, number) for number in range(parts)]
    if not all(file.is_file() for file in files):
        return output.is_file() and not folder.exists()  # parts are missing, or another process has just joined them
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
