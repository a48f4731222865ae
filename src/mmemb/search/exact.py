"""Reads embeddings from disk and searches them exactly.

A file is Parquet with one row per item. Its columns are ``id``, ``text`` (a preview), ``images`` (paths or ``bundled:``
names), ``embedding`` (fixed-size list of float32), ``rationale`` and ``tokens``. The metadata names the model and its
weights. Queries of another model, or of another checkpoint of the same model, are refused.

Search is one matrix product over all rows. It suits up to a few million rows. For more, load the same file into a
vector database.

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
        row: the item's row in the index.
        id: the item's id.
        score: cosine with the query.
        item: the part of the item that the file keeps: text preview and pictures, without the instruction.
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
        rationales: M texts, empty for items that were embedded directly.
        tokens: [M] int32, rationale tokens.
        model: identity of the model that made the embeddings. Empty if unknown.
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
        """Returns the item of a row, as far as the file keeps it."""
        parts: list[Part] = [Image(source) for source in self.images[row]]
        return Item("", (*parts, Text(self.texts[row])) if self.texts[row] or not parts else tuple(parts))

    def search(self, query: Tensor, *, k: int = 5) -> list[list[Hit]]:
        """Finds the k nearest items for every query, best first. Items with equal scores keep the order of the file.

        Args:
            query: normalised embeddings of shape ``[B, D]`` or ``[D]``.
            k: number of results per query. A smaller index gives fewer.

        Raises:
            ValueError: ``k`` is below 1, or the queries have another width than the index.
        """
        query = torch.atleast_2d(query).float().cpu()
        check_numbers("search", at_least=1, k=k)
        if query.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"search: the query has {query.shape[1]} dimensions, but the index has {self.embeddings.shape[1]}; "
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
    """Reads a file that `write_embeddings` wrote.

    Args:
        path: the Parquet file.
        model: identity of the model that embeds the queries. None skips the check.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not Parquet, lacks a column, or was made by another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; create it with `mmemb embed`")
    with named_damage(path, "create it again with `mmemb embed`"):
        table = pq.read_table(path)
        table.validate(full=True)  # a damaged byte in a text can pass the decompressor and would fail below
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or not pa.types.is_fixed_size_list(table.schema.field("embedding").type):
        what = f"column {missing[0]!r} is missing" if missing else "the embeddings vary in length"
        raise ValueError(f"{path}: {what}; give a file that `mmemb embed` wrote")
    written = (table.schema.metadata or {}).get(MODEL_KEY, b"").decode()
    if model is not None and written and written != model:
        architectures = {name.rpartition("+")[0] or name for name in (written, model)}
        what = "another checkpoint of the same architecture" if len(architectures) == 1 else "another model"
        raise ValueError(
            f"{path}: embedded by {what} ({written}), but the query's model is {model}; give the checkpoint that made "
            "this file, or embed the items again"
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
