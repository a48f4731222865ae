"""One line for a Parquet file that is none, or is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa


@contextmanager
def named_damage(path: Path, remedy: str) -> Iterator[None]:
    """Around reading: what pyarrow says of damage becomes one line with the file and what to do.

    Args:
        path: the file that is read.
        remedy: what to do about it.

    Raises:
        ValueError: the file is no Parquet or is damaged. A disk's own errors pass as they are.
    """
    try:
        yield
    # A damaged page or footer is an OSError without a number, a damaged column name a UnicodeDecodeError.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable Parquet file ({reason}); {remedy}") from None
