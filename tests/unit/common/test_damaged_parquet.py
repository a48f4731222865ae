"""Every reader of Parquet names a file with flipped bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmemb.data.rows import read_rows
from mmemb.rationales.storage import read_manifest
from mmemb.search.exact import read_embeddings


@pytest.mark.parametrize("place", [slice(200, 900), slice(-300, -100)], ids=["page", "footer"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "snappy"])
@pytest.mark.parametrize(
    "read",
    [lambda path: list(read_rows(path)), read_embeddings, read_manifest],
    ids=["rows", "index", "pool"],
)
def test_a_file_with_flipped_bytes_is_named(
    tmp_path: Path, read: Callable[[Path], Any], compression: str, place: slice
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": [f"query {n * n}" for n in range(3000)]}), path, compression=compression)
    content = bytearray(path.read_bytes())
    content[place] = bytes(byte ^ 0xFF for byte in content[place])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: "):
        read(path)
