"""Embeddings on disk, and exact search among them.

A file is Parquet, one row an item: ``id``, ``text`` (a preview), ``images`` (paths or ``bundled:`` names),
``embedding`` (fixed-size list of float32), ``rationale``, ``tokens``; its metadata names the model and its weights, so
that a query of another one, or of another checkpoint of it, is refused. Search is one matrix product over all rows:
right up to some millions; beyond, feed a vector database from the same file.

Shape legend: B queries, M embedded items, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.common.files import named_damage
from mmemb.inference.embedding_files import MODEL_KEY
from mmemb.types import Image, Item, Part, Text

_COLUMNS = ("id", "text", "images", "embedding", "rationale", "tokens")


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Attributes:
        row: its row in the index.
        id: the item's id.
        score: cosine with the query.
        item: the item as far as it was kept: text preview and pictures, without instruction.
    """

    row: int
    id: str
    score: float
    item: Item


@dataclass
class EmbeddingIndex:
    """Embedded items in memory.

    Attributes:
        ids: M ids.
        texts: M previews.
        images: M lists of picture sources.
        embeddings: [M, D] float32, normalised.
        rationales: M texts, empty where the item was embedded directly.
        tokens: [M] int32, rationale tokens.
        model: identity of the model that made them; empty if unknown.
    """

    ids: list[str]
    texts: list[str]
    images: list[list[str]]
    embeddings: Tensor
    rationales: list[str]
    tokens: Tensor
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def item(self, row: int) -> Item:
        """The item of a row, as far as it was kept."""
        parts: list[Part] = [Image(source) for source in self.images[row]]
        return Item("", (*parts, Text(self.texts[row])) if self.texts[row] or not parts else tuple(parts))

    def search(self, query: Tensor, *, k: int = 5) -> list[list[Hit]]:
        """The k nearest items of every query, best first; equal scores in the order of the file.

        Args:
            query: [B, D] or [D] normalised embeddings.
            k: results a query; fewer where the index is smaller.

        Raises:
            ValueError: ``k`` below one, or a query of another width.
        """
        query = torch.atleast_2d(query).float().cpu()
        check_numbers("search", at_least=1, k=k)
        if query.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"search: the query has {query.shape[1]} dimensions, the index {self.embeddings.shape[1]}; "
                "embed both with the same model"
            )
        scores = query @ self.embeddings.T
        best = scores.sort(dim=1, descending=True, stable=True)
        found = zip(best.values[:, :k].tolist(), best.indices[:, :k].tolist(), strict=True)
        return [
            [Hit(row, self.ids[row], score, self.item(row)) for score, row in zip(values, rows, strict=True)]
            for values, rows in found
        ]


def read_embeddings(path: str | Path, *, model: str | None = None) -> EmbeddingIndex:
    """Reads what `write_embeddings` wrote.

    Args:
        path: the Parquet file.
        model: identity that the queries will have; None leaves it unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no Parquet, lacks a column, or is of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; make it with `mmemb embed`")
    with named_damage(path, "make it anew with `mmemb embed`"):
        table = pq.read_table(path)
        table.validate(full=True)  # a damaged byte of a text may pass the decompressor, and would fail below
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or not pa.types.is_fixed_size_list(table.schema.field("embedding").type):
        what = f"no column {missing[0]!r}" if missing else "embeddings of varying length"
        raise ValueError(f"{path}: {what}; expected a file made by `mmemb embed`")
    written = (table.schema.metadata or {}).get(MODEL_KEY, b"").decode()
    if model is not None and written and written != model:
        architectures = {name.rpartition("+")[0] or name for name in (written, model)}
        what = "another checkpoint of the same architecture" if len(architectures) == 1 else "another model"
        raise ValueError(
            f"{path}: embedded by {what} ({written}), but the query's model is {model}; give the checkpoint it was "
            "embedded with, or embed it anew"
        )
    width = table.schema.field("embedding").type.list_size
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return EmbeddingIndex(
        ids=table["id"].to_pylist(),
        texts=table["text"].to_pylist(),
        images=table["images"].to_pylist(),
        embeddings=torch.from_numpy(flat.astype(np.float32).reshape(-1, width)),
        rationales=table["rationale"].to_pylist(),
        tokens=torch.tensor(table["tokens"].to_pylist(), dtype=torch.int32),
        model=written,
    )
