"""Reads items, and checks them without opening their pictures.

A row of a pair file (JSONL, a JSON list, or Parquet with the same columns, nested or as JSON text):

    {"id"?: str, "task"?: str, "query": ITEM, "positive": ITEM, "positive_id"?: str, "hard_negatives"?: [ITEM, ...]}

    ITEM = "text"
        | {"instruction"?: str, "fields"?: {name: value}, "text"?: str, "image"?: path, "page"?: path, "video"?: [path]}
        | {"instruction"?: str, "fields"?: {name: value}, "parts": [{"text" | "image" | "video" | "page": ...}, ...]}

Without ``parts``, pictures come before the text, or where the text has the mark ``<|image_1|>``. MMEB rows are
recognised by their columns (`mmemb.data.mmeb`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmemb.common.digests import content_hash
from mmemb.data import mmeb
from mmemb.data.images import resolve_image
from mmemb.data.rows import FieldError, kind_of, located, read_rows
from mmemb.types import Image, Item, Page, Part, Text, Video

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_PARTS = ("image", "video", "page", "text")
_ITEM = ("instruction", "parts", "fields", *_PARTS)


def read_items(path: str | Path, *, image_root: str | None = None, limit: int | None = None) -> list[Item]:
    """Reads the items to embed from a file with one ITEM (and an optional ``id``) per row, or a folder of pictures.

    ``fields["id"]`` of each item is the row's ``id`` or number, or the picture's path relative to the folder.
    Sub-folders are searched too. Pictures come in the order of their paths.

    Args:
        path: the file or folder.
        image_root: see `Source`.
        limit: maximum number of items.

    Raises:
        FileNotFoundError: the file, folder or a picture does not exist.
        ValueError: a row is invalid, or there is nothing to read.
    """
    path = Path(path)
    items: list[Item] = []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        for file in files[:limit]:
            name = file.relative_to(path).as_posix()
            items.append(Item("", (Image(resolve_image(name, path)),), {"id": name}))
    else:
        find = partial(find_picture, root=Path(image_root) if image_root else path.parent)
        for number, row in read_rows(path):
            if limit is not None and len(items) >= limit:
                break
            try:
                identity = checked_name(row.pop("id", number), "id")
                item = parse_item(row, field="item", find=find)
            except (ValueError, FileNotFoundError) as error:
                raise located(error, path, number) from None
            items.append(Item(item.instruction, item.parts, {**item.fields, "id": identity}))
    if not items:
        raise ValueError(f"{path}: has nothing to embed; give rows, or a folder with {', '.join(PICTURE_SUFFIXES)}")
    return items


def content_identity(item: Item) -> str:
    """Returns the identity of a target by its content: its text, its picture's path, or a digest of several parts."""
    if len(item.parts) == 1:
        part = item.parts[0]
        if isinstance(part, Text):
            return f"text:{part.text}"
        if isinstance(part, Image | Page) and isinstance(part.source, str):
            return f"image:{part.source}"
    return f"blake2:{content_hash(_blocks(item))}"


def _blocks(item: Item) -> Iterator[bytes]:
    """Yields kind, length and content of every text and picture."""
    for part in item.parts:
        content = part.text if isinstance(part, Text) else part.frames if isinstance(part, Video) else (part.source,)
        for value in (content,) if isinstance(content, str) else content:
            data = value.encode() if isinstance(value, str) else value.tobytes()
            yield f"{type(part).__name__} {len(data)} ".encode()
            yield data


def parse_item(value: Any, *, field: str, find: mmeb.Find) -> Item:
    """Converts a JSON value to an item. `mmemb.data.items` describes the form of ITEM.

    Args:
        value: the decoded JSON value.
        field: name of the field in error messages.
        find: resolves picture paths.

    Raises:
        FieldError: the value is invalid. The message names the field within `field` and what was expected.
    """
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise FieldError(
            field, f"expected a text or an object with {' / '.join(_PARTS)} or parts, got {kind_of(value)}"
        )
    value = {key: entry for key, entry in value.items() if entry is not None}  # Parquet fills absent fields with nulls
    for key in value:
        if key not in _ITEM:
            raise FieldError(
                f"{field}.{key}", f"is unknown; an item may have {', '.join(_ITEM)}{did_you_mean(key, _ITEM)}"
            )
    parts: tuple[Part, ...]
    if "parts" in value:
        if extra := [key for key in _PARTS if key in value]:
            raise FieldError(f"{field}.{extra[0]}", "is given together with parts; move it into parts")
        parts = _parts(value["parts"], f"{field}.parts", find)
    else:
        pictures = [
            _part(key, value[key], f"{field}.{key}", find) for key in ("image", "video", "page") if key in value
        ]
        text = checked_text(value.get("text", ""), f"{field}.text")
        parts = mmeb.place_pictures(text, pictures, field=f"{field}.text")
    if not parts:
        raise FieldError(field, f"is empty; give it {' / '.join(_PARTS)} or parts")
    instruction = checked_text(value.get("instruction", ""), f"{field}.instruction")
    return Item(instruction, parts, _fields(value.get("fields", {}), f"{field}.fields"))


def _parts(value: Any, field: str, find: mmeb.Find) -> tuple[Part, ...]:
    if not isinstance(value, list):
        raise FieldError(field, f"expected a list of parts, got {kind_of(value)}")
    parts = []
    for index, entry in enumerate(value):
        here = f"{field}[{index}]"
        known = (
            {key: content for key, content in entry.items() if content is not None} if isinstance(entry, dict) else {}
        )
        if len(known) != 1 or next(iter(known)) not in _PARTS:
            got = ", ".join(known) if known else kind_of(entry)
            raise FieldError(here, f"expected an object with one of {', '.join(_PARTS)}, got {got}")
        ((key, content),) = known.items()
        parts.append(_part(key, content, f"{here}.{key}", find))
    return tuple(part for part in parts if not (isinstance(part, Text) and not part.text.strip()))


def _part(key: str, value: Any, field: str, find: mmeb.Find) -> Part:
    if key == "video":
        if not isinstance(value, list) or not value:
            raise FieldError(field, f"expected a non-empty list of frame pictures in order, got {kind_of(value)}")
        return Video(tuple(find(f"{field}[{index}]", frame) for index, frame in enumerate(value)))
    if key == "text":
        return Text(checked_text(value, field))
    return (Image if key == "image" else Page)(find(field, value))


def checked_text(value: Any, field: str) -> str:
    """Returns the value if it is a text that can be encoded as UTF-8.

    Raises:
        FieldError: the value is not such a text.
    """
    if not isinstance(value, str):
        raise FieldError(field, f"expected a text, got {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows it, but no file or tokenizer accepts it
        half, place = value[error.start], error.start + 1
        raise FieldError(
            field, f"has half a character, {half!a}, at position {place}; write the whole character or remove it"
        ) from None
    return value


def checked_name(value: Any, field: str) -> str:
    """Returns a name as a text. The value may be a text or an integer.

    Raises:
        FieldError: the value is neither.
    """
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else checked_text(value, field)


def _fields(value: Any, field: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FieldError(field, f"expected an object of names and values, got {kind_of(value)}")
    for key, entry in value.items():
        if isinstance(entry, dict | list):
            raise FieldError(f"{field}.{key}", f"expected a text or a number, got {kind_of(entry)}")
        checked_text(key, field)
        checked_text(str(entry), f"{field}.{key}")
    return {key: str(entry) for key, entry in value.items() if entry is not None}


def find_picture(field: str, path: Any, *, root: Path) -> str:
    """Resolves the path of a picture that a row names.

    Args:
        field: name of the row's field in error messages.
        path: the value in the row.
        root: the folder that the path is relative to. The picture must be inside it.

    Raises:
        FieldError: the value is no path, or the path leads out of the folder.
        FileNotFoundError: there is no such picture.
    """
    if not isinstance(path, str) or not path:
        raise FieldError(
            field, f"expected the path of a picture, got {kind_of(path) if path != '' else 'an empty text'}"
        )
    try:
        return resolve_image(path, root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"field {field!r}: {error}") from None
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def did_you_mean(word: str, options: Sequence[str] | set[str]) -> str:
    """Returns a hint with the option most similar to a word. Empty if no option is similar."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
