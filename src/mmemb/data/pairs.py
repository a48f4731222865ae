"""Reads pairs and retrieval tasks, and checks them without opening their pictures.

A row of a pair file (JSONL, a JSON list, or Parquet with the same columns, nested or as JSON text):

    {"id"?: str, "task"?: str, "query": ITEM, "positive": ITEM, "positive_id"?: str, "hard_negatives"?: [ITEM, ...]}

`mmemb.data.items` describes the form of ITEM. MMEB rows are recognised by their columns (`mmemb.data.mmeb`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from mmemb.data import mmeb
from mmemb.data.items import checked_name, checked_text, content_identity, did_you_mean, find_picture, parse_item
from mmemb.data.rows import FieldError, kind_of, located, read_rows
from mmemb.data.sources import Source
from mmemb.types import EvaluationTask, Item, Pair

_ROW = ("id", "task", "query", "positive", "positive_id", "hard_negatives")


_MMEB_TEXTS = ("qry", "pos_text", "neg_text", "qry_inst", "qry_text", "tgt_inst", "tgt_text")


def read_pairs(source: Source, *, seed: int = 0) -> Sequence[Pair]:
    """Reads and checks every row of a source.

    Args:
        source: a pair file, MMEB rows, or bundled data. ``bundled:pretrain`` gives a very long sequence that is
            computed on access.
        seed: seed of the scenes that the bundled data composes.

    Raises:
        FileNotFoundError: the file, or a picture that a row names, does not exist.
        ValueError: a row is invalid (the message names file, row and field), or no row is left.
    """
    if source.bundled is not None:
        return _bundled_pairs(source, seed)
    pairs = list(_file_pairs(source))
    return _kept(source, pairs)


def read_tasks(source: Source) -> list[EvaluationTask]:
    """Reads the retrieval tasks of a source: bundled data, MMEB image evaluation rows, or a pair file.

    A pair file gives one retrieval task for each task of its rows. The candidates of a retrieval task are the positives
    and hard negatives of all its rows, without duplicates by identity. A query of MMEB evaluation rows is ranked
    against its own positive and hard negatives only.

    Raises:
        FileNotFoundError, ValueError: for the same reasons as in `read_pairs`.
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


def _bundled_pairs(source: Source, seed: int) -> Sequence[Pair]:
    from mmemb.data import bundled

    if source.bundled == "pretrain":
        # Map-style: callers only index it and take its length.
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
        raise ValueError(f"{source.path}: has no rows; add rows or remove the source")
    return kept


def _file_pairs(source: Source) -> Iterator[Pair]:
    path = Path(source.path)
    find = partial(find_picture, root=Path(source.image_root) if source.image_root else path.parent)
    numbers: dict[str, int] = {}
    seen: dict[str, Item] = {}
    for number, row in read_rows(path):
        try:
            pair = _pair(row, number, source, path, find, seen)
            if pair.id in numbers:
                raise FieldError("id", f"{pair.id!r} is already in row {numbers[pair.id]}; ids must be unique")
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
                    checked_text(entry, key)
        if mmeb.is_train(row):
            return mmeb.read_train_row(row, id=identity, task=task, find=find, identify=content_identity)
        return mmeb.read_evaluation_row(row, id=identity, task=task, find=find, identify=content_identity, seen=seen)
    row = {key: value for key, value in row.items() if value is not None}
    for name in ("query", "positive"):
        if name not in row:
            typo = difflib.get_close_matches(name, row, n=1)
            hint = f"; rename {typo[0]!r}" if typo else f"; the row has {', '.join(row) or 'no fields'}"
            raise FieldError(name, f"is missing; every row needs a query and a positive{hint}")
    for key in row:  # users may have other columns, but a name similar to a known one is a mistake
        if key not in _ROW and (hint := did_you_mean(key, _ROW)):
            raise FieldError(key, f"is unknown{hint}")
    task = checked_text(row.get("task", source.task or path.stem), "task")
    positive = parse_item(row["positive"], field="positive", find=find)
    hard = row.get("hard_negatives", [])
    if not isinstance(hard, list):
        raise FieldError("hard_negatives", f"expected a list of items, got {kind_of(hard)}")
    negatives = tuple(parse_item(item, field=f"hard_negatives[{index}]", find=find) for index, item in enumerate(hard))
    return Pair(
        id=checked_name(row.get("id", f"{task}/{path.stem}:{number}"), "id"),
        task=task,
        query=parse_item(row["query"], field="query", find=find),
        positive=positive,
        positive_id=checked_name(row.get("positive_id", content_identity(positive)), "positive_id"),
        hard_negatives=negatives,
        hard_negative_ids=tuple(content_identity(item) for item in negatives),
    )


def _refuse_unknown_tasks(source: Source, existing: set[str]) -> None:
    for task in source.tasks or ():
        if existing and task not in existing:
            hint, names = did_you_mean(task, existing), ", ".join(sorted(existing))
            raise ValueError(f"{source.path}: has no task {task!r}{hint}; its tasks: {names}")
