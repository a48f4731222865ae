"""Writes into the current folder what a user may have got wrong: configs, rows, pictures, checkpoints."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from tests.integration.small import rows, write_rows

Given: TypeAlias = Callable[[], None]
"""Prepares the current folder for one mistake."""


def nothing() -> None:
    """Leaves the folder as it is."""


def file(name: str, content: str | bytes) -> Given:
    """One file with this content."""

    def write() -> None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def config(content: str | bytes) -> Given:
    """A config of the user's own, ``given.yaml``."""
    return file("given.yaml", content)


def row(key: str, value: Any = None) -> Given:
    """The third row of ``pairs.jsonl`` has another value at the top level; None takes the key away."""

    def write() -> None:
        content = rows()
        content[2] = {name: part for name, part in {**content[2], key: value}.items() if part is not None}
        write_rows(Path(), content)

    return write


def query(**changes: Any) -> Given:
    """The third row of ``pairs.jsonl`` has other parts in its query."""
    return row("query", {**rows()[2]["query"], **changes})


def pictures(data: bytes) -> Given:
    """Every picture of the rows has this content, so that whichever is read first is broken."""

    def write() -> None:
        for path in Path("pictures").iterdir():
            path.write_bytes(data)

    return write


def linked_picture() -> None:
    """One picture of the rows is a link to a file outside the folder."""
    elsewhere = Path.cwd().parent / f"{Path.cwd().name}_elsewhere.png"
    Path("pictures/red.png").rename(elsewhere)
    Path("pictures/red.png").symlink_to(elsewhere)


def png(width: int, height: int) -> bytes:
    """A black picture."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_items() -> None:
    """What ``embed`` and ``search`` may be given: good pictures, an empty folder, broken and misnamed files."""
    for folder in ("pictures", "empty", "broken", "deep.parquet"):
        Path(folder).mkdir(exist_ok=True)
    Path("pictures/red.png").write_bytes(png(64, 64))
    Path("broken/broken.png").write_bytes(b"no picture")
    Path("rows.jsonl").write_text(json.dumps({"txt": "apple"}) + "\n", encoding="utf-8")
    Path("out.jsonl").write_text(json.dumps({"image": "../outside.png"}) + "\n", encoding="utf-8")
    Path("bad.parquet").write_bytes(b"no parquet")
