"""Files to pairs, items and retrieval tasks. Pictures are named, never opened.

One row of a pair file (JSONL, a JSON list, or Parquet with the same columns, nested or as JSON text):

    {"id"?: str, "task"?: str, "query": ITEM, "positive": ITEM, "positive_id"?: str, "hard_negatives"?: [ITEM, ...]}

    ITEM = "text"
        | {"instruction"?: str, "fields"?: {name: value}, "text"?: str, "image"?: path, "page"?: path, "video"?: [path]}
        | {"instruction"?: str, "fields"?: {name: value}, "parts": [{"text" | "image" | "video" | "page": ...}, ...]}

Without ``parts`` pictures come before the text, or where the text has the mark ``<|image_1|>``. MMEB rows are
recognised by their columns (`mmemb.data.mmeb`).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from mmemb.data import mmeb
from mmemb.data.images import BUNDLED, resolve_image
from mmemb.data.rows import FieldError, kind_of, located, read_rows
from mmemb.types import EvaluationTask, Image, Item, Page, Pair, Part, Text, Video

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_ROW = ("id", "task", "query", "positive", "positive_id", "hard_negatives")
_PARTS = ("image", "video", "page", "text")
_MMEB_TEXTS = ("qry", "pos_text", "neg_text", "qry_inst", "qry_text", "tgt_inst", "tgt_text")
_ITEM = ("instruction", "parts", "fields", *_PARTS)


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, or bundled data: ``bundled:train``, ``bundled:control``,
            ``bundled:validation``, ``bundled:test``, ``bundled:pretrain``. For predict also a folder of pictures.
        weight: how often each task of this source is drawn, relative to the tasks of other sources (training only).
        image_root: folder that image paths are relative to and must stay inside of; the file's own folder by default.
        tasks: keep these tasks only; all by default.
        limit: keep at most this many rows of each task; all by default.
        task: task name of rows that name none; the file's name by default (its folder's for MMEB files).
    """

    path: str
    weight: float = 1.0
    image_root: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    task: str | None = None

    def check(self, owner: str) -> None:
        """Refuses a choice of nothing. Not at once in `__init__`: the parser would bury the message in its own.

        Args:
            owner: the list that the source stands in, in messages.

        Raises:
            ValueError: no task or no row can be left.
        """
        refuse_below(1, f"{owner}, {self.path}: source", limit=self.limit)
        if self.tasks is not None and not self.tasks:
            raise ValueError(f"{owner}, {self.path}: source.tasks: is empty; name tasks, or leave it out for all")

    @property
    def bundled(self) -> str | None:
        """Split of the bundled data, None for a file."""
        return self.path.removeprefix(BUNDLED) if self.path.startswith(BUNDLED) else None


def refuse_below(least: float, owner: str, **settings: float | None) -> None:
    """Refuses settings that are less than the least one that means something; None stands for a default.

    Args:
        least: the least accepted.
        owner: what the settings belong to, in messages.
        settings: values by name.

    Raises:
        ValueError: names the first such setting.
    """
    for name, value in settings.items():
        if value is not None and not value >= least:  # nan, too
            raise ValueError(f"{owner}.{name}: expected {least} or more, got {value}; raise it or leave it out")


def read_pairs(source: Source, *, seed: int = 0) -> Sequence[Pair]:
    """Reads and checks every row of a source.

    Args:
        source: a pair file, MMEB-train rows, or bundled data; ``bundled:pretrain`` gives a very long sequence that is
            computed on access.
        seed: of the bundled data's composed scenes.

    Raises:
        FileNotFoundError: the file, or a picture that a row names, does not exist.
        ValueError: a row is wrong (names file, row and field), or no row is left.
    """
    if source.bundled is not None:
        return _bundled_pairs(source, seed)
    pairs = list(_file_pairs(source))
    return _kept(source, pairs)


def read_tasks(source: Source) -> list[EvaluationTask]:
    """Retrieval tasks: bundled ones, MMEB image evaluation rows, or one a task of a pair file.

    Candidates of a pair file's task are all its positives and hard negatives, deduplicated by identity. Each query of
    MMEB evaluation rows is ranked against its own, positive and hard negatives; the task's are the union.

    Raises:
        FileNotFoundError, ValueError: as `read_pairs`.
    """
    if source.bundled is not None:
        from mmemb.data.bundled import evaluation_tasks

        tasks = evaluation_tasks(source.bundled, tasks=source.tasks)
        return [
            EvaluationTask(task.name, task.queries[: source.limit], task.candidates, task.candidate_ids)
            for task in tasks
        ]
    by_task: dict[str, list[Pair]] = {}
    for pair in read_pairs(source):
        by_task.setdefault(pair.task, []).append(pair)
    tasks = []
    for name, pairs in by_task.items():
        candidates: dict[str, Item] = {}
        for pair in pairs:
            candidates.setdefault(pair.positive_id, pair.positive)
            for identity, item in zip(pair.hard_negative_ids, pair.hard_negatives, strict=True):
                candidates.setdefault(identity, item)
        tasks.append(EvaluationTask(name, pairs, list(candidates.values()), list(candidates)))
    return tasks


def read_items(path: str | Path, *, image_root: str | None = None, limit: int | None = None) -> list[Item]:
    """Items to embed: a file with one ITEM a row (and an optional ``id``), or a folder of pictures.

    ``fields["id"]`` of each item is the row's ``id`` or number, or the picture's path relative to the folder. Pictures
    are found in sub-folders too and come in the order of their paths.

    Args:
        path: the file or folder.
        image_root: see `Source`.
        limit: read at most this many.

    Raises:
        FileNotFoundError: the file, folder or a picture does not exist.
        ValueError: a row is wrong, or there is nothing to read.
    """
    path = Path(path)
    items: list[Item] = []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        for file in files[:limit]:
            name = file.relative_to(path).as_posix()
            items.append(Item("", (Image(resolve_image(name, path)),), {"id": name}))
    else:
        find = partial(_find, root=Path(image_root) if image_root else path.parent)
        for number, row in read_rows(path):
            if limit is not None and len(items) >= limit:
                break
            try:
                identity = _name(row.pop("id", number), "id")
                item = parse_item(row, field="item", find=find)
            except (ValueError, FileNotFoundError) as error:
                raise located(error, path, number) from None
            items.append(Item(item.instruction, item.parts, {**item.fields, "id": identity}))
    if not items:
        raise ValueError(f"{path}: holds nothing to embed; give rows, or a folder with {', '.join(PICTURE_SUFFIXES)}")
    return items


def content_identity(item: Item) -> str:
    """Identity of a target by its content: its text, its picture's path, or a digest where it has several parts."""
    if len(item.parts) == 1:
        part = item.parts[0]
        if isinstance(part, Text):
            return f"text:{part.text}"
        if isinstance(part, Image | Page) and isinstance(part.source, str):
            return f"image:{part.source}"
    digest = hashlib.blake2b(digest_size=16)
    for part in item.parts:
        content = part.text if isinstance(part, Text) else part.frames if isinstance(part, Video) else (part.source,)
        for value in (content,) if isinstance(content, str) else content:
            data = value.encode() if isinstance(value, str) else value.tobytes()
            digest.update(f"{type(part).__name__} {len(data)} ".encode() + data)
    return f"blake2:{digest.hexdigest()}"


def parse_item(value: Any, *, field: str, find: mmeb.Find) -> Item:
    """ITEM of the module's schema -> an item.

    Args:
        value: the decoded JSON value.
        field: its name in messages.
        find: resolves picture paths.

    Raises:
        FieldError: names the field within `field` and what was expected.
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
            raise FieldError(f"{field}.{key}", f"is unknown; an item has {', '.join(_ITEM)}{_did_you_mean(key, _ITEM)}")
    parts: tuple[Part, ...]
    if "parts" in value:
        if extra := [key for key in _PARTS if key in value]:
            raise FieldError(f"{field}.{extra[0]}", "stands beside parts; move it into parts")
        parts = _parts(value["parts"], f"{field}.parts", find)
    else:
        pictures = [
            _part(key, value[key], f"{field}.{key}", find) for key in ("image", "video", "page") if key in value
        ]
        text = _string(value.get("text", ""), f"{field}.text")
        parts = mmeb.place_pictures(text, pictures, field=f"{field}.text")
    if not parts:
        raise FieldError(field, f"is empty; give it {' / '.join(_PARTS)} or parts")
    instruction = _string(value.get("instruction", ""), f"{field}.instruction")
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
            raise FieldError(field, f"expected a list of frame pictures in order, got {kind_of(value)}")
        return Video(tuple(find(f"{field}[{index}]", frame) for index, frame in enumerate(value)))
    if key == "text":
        return Text(_string(value, field))
    return (Image if key == "image" else Page)(find(field, value))


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"expected a text, got {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say it, no tokenizer or file can take it
        half, place = value[error.start], error.start + 1
        raise FieldError(
            field, f"has half a character, {half!a}, at place {place}; write it whole or drop it"
        ) from None
    return value


def _name(value: Any, field: str) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _string(value, field)


def _fields(value: Any, field: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FieldError(field, f"expected an object of names and values, got {kind_of(value)}")
    for key, entry in value.items():
        if isinstance(entry, dict | list):
            raise FieldError(f"{field}.{key}", f"expected a text or a number, got {kind_of(entry)}")
        _string(key, field)
        _string(str(entry), f"{field}.{key}")
    return {key: str(entry) for key, entry in value.items() if entry is not None}


def _find(field: str, path: Any, *, root: Path) -> str:
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


def _file_pairs(source: Source) -> Iterator[Pair]:
    path = Path(source.path)
    find = partial(_find, root=Path(source.image_root) if source.image_root else path.parent)
    numbers: dict[str, int] = {}
    seen: dict[str, Item] = {}
    for number, row in read_rows(path):
        try:
            pair = _pair(row, number, source, path, find, seen)
            if pair.id in numbers:
                raise FieldError("id", f"{pair.id!r} stands already in row {numbers[pair.id]}; ids must be unique")
        except (ValueError, FileNotFoundError) as error:
            raise located(error, path, number) from None
        numbers[pair.id] = number
        yield pair


def _pair(row: dict[str, Any], number: int, source: Source, path: Path, find: mmeb.Find, seen: dict[str, Item]) -> Pair:
    if mmeb.is_train(row) or mmeb.is_evaluation(row):
        task = source.task or mmeb.train_task(path)
        identity = f"{task}/{path.stem}:{number}"
        for key, value in row.items():
            for entry in value if isinstance(value, list) else (value,):
                if key in _MMEB_TEXTS and isinstance(entry, str):
                    _string(entry, key)
        if mmeb.is_train(row):
            return mmeb.read_train_row(row, id=identity, task=task, find=find, identify=content_identity)
        return mmeb.read_evaluation_row(row, id=identity, task=task, find=find, identify=content_identity, seen=seen)
    row = {key: value for key, value in row.items() if value is not None}
    for name in ("query", "positive"):
        if name not in row:
            typo = difflib.get_close_matches(name, row, n=1)
            hint = f"; rename {typo[0]!r}" if typo else f"; the row has {', '.join(row) or 'no fields'}"
            raise FieldError(name, f"is missing; every row needs a query and a positive{hint}")
    for key in row:  # other columns are the user's own business; near misses are mistakes
        if key not in _ROW and (hint := _did_you_mean(key, _ROW)):
            raise FieldError(key, f"is unknown{hint}")
    task = _string(row.get("task", source.task or path.stem), "task")
    positive = parse_item(row["positive"], field="positive", find=find)
    hard = row.get("hard_negatives", [])
    if not isinstance(hard, list):
        raise FieldError("hard_negatives", f"expected a list of items, got {kind_of(hard)}")
    negatives = tuple(parse_item(item, field=f"hard_negatives[{index}]", find=find) for index, item in enumerate(hard))
    return Pair(
        id=_name(row.get("id", f"{task}/{path.stem}:{number}"), "id"),
        task=task,
        query=parse_item(row["query"], field="query", find=find),
        positive=positive,
        positive_id=_name(row.get("positive_id", content_identity(positive)), "positive_id"),
        hard_negatives=negatives,
        hard_negative_ids=tuple(content_identity(item) for item in negatives),
    )


def _bundled_pairs(source: Source, seed: int) -> Sequence[Pair]:
    from mmemb.data import bundled

    if source.bundled == "pretrain":
        # Map-style: only indexed and measured.
        return cast(Sequence[Pair], bundled.PretrainingSamples(seed, tasks=source.tasks))
    return _kept(source, bundled.load_pairs(source.bundled or "", tasks=source.tasks, seed=seed))


def _kept(source: Source, pairs: Sequence[Pair]) -> list[Pair]:
    _refuse_unknown_tasks(source, {pair.task for pair in pairs})
    counts: dict[str, int] = {}
    kept = []
    for pair in pairs:
        if source.tasks is not None and pair.task not in source.tasks:
            continue
        counts[pair.task] = counts.get(pair.task, 0) + 1
        if source.limit is None or counts[pair.task] <= source.limit:
            kept.append(pair)
    if not kept:
        raise ValueError(f"{source.path}: holds no rows; add rows or take the source out")
    return kept


def _refuse_unknown_tasks(source: Source, existing: set[str]) -> None:
    for task in source.tasks or ():
        if existing and task not in existing:
            hint, names = _did_you_mean(task, existing), ", ".join(sorted(existing))
            raise ValueError(f"{source.path}: has no task {task!r}{hint}; its tasks: {names}")


def _did_you_mean(word: str, options: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
