"""Reads MMEB's row formats: MMEB-train rows as pairs, image evaluation rows as the queries of a retrieval task.

A row is recognised by its columns. In both formats the mark ``<|image_1|>`` in a text is the place of the picture. An
empty text or path means that there is no text or picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmemb.data.rows import FieldError, kind_of
from mmemb.types import Image, Item, Pair, Part, Text

TRAIN_COLUMNS = frozenset({"qry", "qry_image_path", "pos_text", "pos_image_path"})
EVALUATION_COLUMNS = frozenset({"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"})

_MARK = re.compile(r"<\|image_(\d+)\|>")
_SPLIT_NAMES = re.compile(r"(original|diverse_instruction|train|test|validation)\b")

Find = Callable[[str, str], str]
"""(field, path as written) -> absolute path of a picture. Raises `FieldError` or FileNotFoundError."""


def place_pictures(text: str, pictures: list[Part], *, field: str) -> tuple[Part, ...]:
    """Replaces each mark ``<|image_n|>`` in a text by the n-th picture. Pictures without a mark come first.

    Raises:
        FieldError: a mark has a number without a picture.
    """
    parts: list[Part] = []
    placed: set[int] = set()
    for index, piece in enumerate(_MARK.split(text)):
        if index % 2 == 0:
            if piece.strip():
                parts.append(Text(piece.strip()))
            continue
        number = int(piece)
        if not 1 <= number <= len(pictures):
            raise FieldError(
                field,
                f"has the mark <|image_{number}|>, but {len(pictures)} picture(s); add the picture or remove the mark",
            )
        placed.add(number)
        parts.append(pictures[number - 1])
    return (*(picture for number, picture in enumerate(pictures, 1) if number not in placed), *parts)


def train_task(path: Path) -> str:
    """Returns the task of an MMEB file: its name, or its folder's if it is named after a split (as on the hub)."""
    return path.parent.name if _SPLIT_NAMES.match(path.stem) and path.parent.name else path.stem


def read_train_row(row: Mapping[str, Any], *, id: str, task: str, find: Find, identify: Callable[[Item], str]) -> Pair:
    """Converts an MMEB-train row to a pair.

    Columns: ``qry, qry_image_path, pos_text, pos_image_path[, neg_text, neg_image_path]``.

    Args:
        row: the row.
        id: identity of the pair.
        task: its task.
        find: resolves picture paths.
        identify: identity of a target by its content.

    Raises:
        FieldError: a field has the wrong type, or the query or the positive is empty.
    """
    query = _item(row, "qry", "qry_image_path", find)
    positive = _item(row, "pos_text", "pos_image_path", find)
    negatives: tuple[Item, ...] = ()
    if _text(row, "neg_text") or _text(row, "neg_image_path"):
        negatives = (_item(row, "neg_text", "neg_image_path", find),)
    return Pair(
        id=id,
        task=task,
        query=query,
        positive=positive,
        positive_id=identify(positive),
        hard_negatives=negatives,
        hard_negative_ids=tuple(identify(item) for item in negatives),
    )


def read_evaluation_row(
    row: Mapping[str, Any], *, id: str, task: str, find: Find, identify: Callable[[Item], str], seen: dict[str, Item]
) -> Pair:
    """Converts an image evaluation row to a query and its candidates.

    Columns: ``[qry_inst,] qry_text, qry_img_path, [tgt_inst,] tgt_text[], tgt_img_path[]``. Index 0 of the target lists
    is the ground truth and becomes the positive. The others become the hard negatives.

    Args:
        row: the row.
        id: identity of the query.
        task: its task.
        find: resolves picture paths.
        identify: identity of a target by its content.
        seen: identity -> candidate, for all rows so far. New candidates are added. Queries share equal candidates.

    Raises:
        FieldError: a field has the wrong type, a list is empty, or the lists differ in length.
    """
    query = _item(row, "qry_text", "qry_img_path", find, instruction="qry_inst")
    texts, paths = row.get("tgt_text"), row.get("tgt_img_path")
    for field, value in (("tgt_text", texts), ("tgt_img_path", paths)):
        if not isinstance(value, list) or not value:
            raise FieldError(field, f"expected a non-empty list with the ground truth first, got {kind_of(value)}")
    assert isinstance(texts, list)
    assert isinstance(paths, list)
    if len(texts) != len(paths):
        raise FieldError(
            "tgt_img_path", f"has {len(paths)} entries, but tgt_text has {len(texts)}; give one per candidate"
        )
    candidates: dict[str, Item] = {}
    for text, path in zip(texts, paths, strict=True):
        target = {"tgt_text": text, "tgt_img_path": path, "tgt_inst": row.get("tgt_inst")}
        item = _item(target, "tgt_text", "tgt_img_path", find, instruction="tgt_inst")
        identity = identify(item)
        candidates.setdefault(identity, seen.setdefault(identity, item))
    (positive_id, positive), *others = candidates.items()
    return Pair(
        id=id,
        task=task,
        query=query,
        positive=positive,
        positive_id=positive_id,
        hard_negatives=tuple(item for _, item in others),
        hard_negative_ids=tuple(identity for identity, _ in others),
        ranked_alone=True,
    )


def is_train(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are MMEB-train rows."""
    return frozenset(columns) >= TRAIN_COLUMNS


def is_evaluation(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are image evaluation rows."""
    return frozenset(columns) >= EVALUATION_COLUMNS


def _item(row: Mapping[str, Any], text: str, image: str, find: Find, *, instruction: str | None = None) -> Item:
    words, path = _text(row, text), _text(row, image)
    pictures: list[Part] = [Image(find(image, path))] if path else []
    parts = place_pictures(words, pictures, field=text)
    if not parts:
        raise FieldError(text, f"is empty, and so is {image}; give a text, a picture or both")
    task = _MARK.sub(" ", _text(row, instruction)) if instruction else ""
    return Item(" ".join(task.split()), parts)


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FieldError(field, f"expected a text, got {kind_of(value)}")
    return value
