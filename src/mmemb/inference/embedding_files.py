"""Writes embeddings to disk: one Parquet row per item, and the model that made them.

Columns: ``id``, ``text`` (a preview), ``images`` (paths or ``bundled:`` names), ``embedding`` (fixed-size list of
float32), ``rationale`` and ``tokens``. The file's metadata names the model and its weights, so that a query of another
model, or of another checkpoint of the same model, is refused. `mmemb.search.exact` reads and searches these files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmemb.common.digests import digest, module_digest
from mmemb.common.files import whole_file
from mmemb.interfaces import Backbone, Pooler
from mmemb.types import Encoded, Item, pictures

_PREVIEW = 500
"""Number of characters of an item's text that the file keeps."""


MODEL_KEY = b"mmemb.model"


def model_identity(backbone: Backbone, pooler: Pooler) -> str:
    """Returns the architecture and a digest of the weights of backbone and pooler.

    The digest uses a probe of every tensor, so it costs almost nothing.
    """
    return f"{backbone.identity}+{digest([module_digest(backbone), module_digest(pooler)])}"


def embedding_table(
    items: Sequence[Item], encoded: Encoded, *, ids: Sequence[str] | None = None, model: str = ""
) -> pa.Table:
    """Builds the rows of the file. The arguments are those of `write_embeddings`.

    Raises:
        ValueError: the numbers of items, ids and embeddings differ.
    """
    names = [item.fields.get("id", str(row)) for row, item in enumerate(items)] if ids is None else list(ids)
    vectors = encoded.embedding.float().cpu().numpy()
    if not len(items) == len(names) == len(vectors):
        raise ValueError(
            f"there are {len(items)} items, {len(names)} ids and {len(vectors)} embeddings; give one id and one "
            "embedding per item"
        )
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), type=pa.float32())
    return pa.table(
        {
            "id": pa.array(names, type=pa.string()),
            "text": pa.array([item.text[:_PREVIEW] for item in items], type=pa.string()),
            "images": pa.array(
                [[source for source in pictures(item) if isinstance(source, str)] for item in items],
                type=pa.list_(pa.string()),
            ),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "rationale": pa.array(encoded.rationale, type=pa.string()),
            "tokens": pa.array(encoded.tokens.tolist(), type=pa.int32()),
        }
    ).replace_schema_metadata({MODEL_KEY: model.encode()})


def write_embeddings(
    path: str | Path, items: Sequence[Item], encoded: Encoded, *, ids: Sequence[str] | None = None, model: str = ""
) -> Path:
    """Writes embedded items to a Parquet file. The file appears only when it is complete.

    Creates the folder if it does not exist.

    Args:
        path: the file to write.
        items: M items. Pictures given as PIL images have no name in the file.
        encoded: the embeddings of the items.
        ids: M ids. None takes the ``id`` field of each item, or its number if it has none.
        model: identity of the model (`model_identity`).

    Returns:
        the path.

    Raises:
        ValueError: the numbers of items, ids and embeddings differ.
    """
    path = Path(path)
    table = embedding_table(items, encoded, ids=ids, model=model)
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path
