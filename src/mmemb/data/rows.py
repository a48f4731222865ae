"""Reads the raw rows of files. Error messages name the file, row and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")
_PARQUET_ROWS = 4096
_NESTED = {"query": dict, "positive": dict, "hard_negatives": list, "parts": list, "fields": dict}
"""Columns of objects or lists, which Parquet may store as JSON text. No other text is decoded, because a target may be
the text ``[1]``."""


class FieldError(ValueError):
    """Raised for an invalid field of a row. `located` adds file and row."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")


def located(error: Exception, path: Path, number: int) -> Exception:
    """Returns an error of the same family with file and row before its message."""
    family = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return family(f"{path}, {_unit(path)} {number}, {error}")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of a JSONL, JSON (a list of objects) or Parquet file. Lines or rows are counted from 1.

    Skips blank lines. Nested columns of Parquet may be stored as such or as JSON text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, the content cannot be read, or a row is no object. The message names file
            and row.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: has the unknown suffix {path.suffix!r}; data files end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; correct the path of the source")
    reader = {".jsonl": _lines, ".json": _list, ".parquet": _parquet}[path.suffix]
    try:
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, {_unit(path)} {number}: expected an object with fields, got {kind_of(row)}")
            yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def kind_of(value: Any) -> str:
    """Describes a JSON value in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), f"the {type(value).__name__} {value!r}")


def _unit(path: Path) -> str:
    return "line" if path.suffix == ".jsonl" else "row"


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: is not valid JSON ({error.msg} at column {error.colno}); "
                    f"write one JSON object per line"
                ) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {_too_much(error)}") from None


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: is not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}); "
            f"write a list of objects, or one object per line in a .jsonl file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_too_much(error)}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {kind_of(rows)}; wrap the rows in [ ]")
    yield from enumerate(rows, 1)


def _too_much(error: Exception) -> str:
    """Returns the problem of JSON that is valid and still cannot be decoded."""
    if isinstance(error, RecursionError):
        return "is nested too deeply; write rows that are objects with fields, and items of a few levels at most"
    return "has a number with too many digits; write it as a text, in quotes"


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    from mmemb.common.files import named_damage

    number = 0
    with named_damage(path, "write it again"), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: _decoded(key, value) for key, value in row.items()}


def _decoded(column: str, value: Any) -> Any:
    if column == "hard_negatives" and isinstance(value, list):
        return [_decoded("positive", item) for item in value]
    if column in _NESTED and isinstance(value, str):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return decoded if isinstance(decoded, _NESTED[column]) else value
    return value
