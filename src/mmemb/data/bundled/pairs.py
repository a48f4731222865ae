"""Makes the pairs and evaluation tasks of the bundled data set. Items only name their pictures: none is opened here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from mmemb.data.bundled.entities import (
    ATTRIBUTES,
    VENDORS,
    Entity,
    check_split,
    countries,
    entities,
    order,
    scene_vocabulary,
)
from mmemb.data.bundled.pictures import PREFIX, scene_name
from mmemb.data.bundled.scenes import Scene, draw_scene, mention_split, near_miss
from mmemb.data.bundled.tasks import (
    SCENE_TASKS,
    TASKS,
    caption,
    fact_phrasings,
    find_question,
    flag_question,
    flag_scene_question,
    left_question,
)
from mmemb.types import EvaluationTask, Image, Item, Pair, Text

QUERIES = {"train": 2000, "control": 300, "validation": 60, "test": 150}
"""Number of queries that each scene task draws in a split. In held-out splits, also the maximum for other tasks."""
NEAR_MISSES = {"control": 50, "validation": 50, "test": 50}
"""Maximum number of near-miss scenes among the candidates of ``scenematch`` and ``findscene``."""
NAME_CANDIDATES, VALUE_CANDIDATES = 150, 200
_DRAW = {"test": "test, seventh draw"}
"""Name of the draw of test scenes. Test scenes are drawn again if a setting of the main job was chosen after an earlier
setting had been scored on them."""


def picture_item(name: str) -> Item:
    """Returns a target with one picture."""
    return Item("", (Image(PREFIX + name),))


def text_item(text: str) -> Item:
    """Returns a target with one text."""
    return Item("", (Text(text),))


def load_pairs(
    split: str, *, tasks: Sequence[str] | None = None, seed: int = 0, scenes_per_task: int | None = None
) -> list[Pair]:
    """Makes the pairs of a split, one task after the other. Opens no picture.

    Args:
        split: ``train``, ``control``, ``validation`` or ``test``.
        tasks: names from `TASKS`. By default, all.
        seed: seed of the scenes. Tasks without scenes do not depend on it.
        scenes_per_task: number of queries that each scene task draws. By default, `QUERIES` of the split.

    Raises:
        ValueError: the split or a task is unknown, or the split does not have that many scenes.
    """
    check_split(split)
    count = QUERIES[split] if scenes_per_task is None else scenes_per_task
    pairs: list[Pair] = []
    for task in check_tasks(tasks):
        rng = random.Random(f"{seed}/{task}/{_DRAW.get(split, split)}")
        made = list(_BUILDERS[task](split, rng, count))
        if split != "train" and task not in SCENE_TASKS and len(made) > QUERIES[split]:
            kept = sorted(made, key=lambda pair: order("query", pair.id))[: QUERIES[split]]
            made = sorted(kept, key=lambda pair: pair.id)
        pairs += made
    return pairs


def check_tasks(tasks: Sequence[str] | None) -> list[str]:
    """Returns the task names if they all exist. None means all tasks.

    Raises:
        ValueError: there is no such task.
    """
    names = list(TASKS) if tasks is None else list(tasks)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r} of the bundled data; choose from: {', '.join(TASKS)}")
    return names


def evaluation_tasks(split: str, *, tasks: Sequence[str] | None = None) -> list[EvaluationTask]:
    """Makes the retrieval tasks of a split. The queries are its pairs with seed 0. Each task has its own candidates.

    Candidates are the positives of all queries, then distractors of the same kind: names, values or pictures of the
    data set. For scenes, the distractors are near misses of the first positives: two cells swapped, or one replaced.

    A task of the train split shows what training has memorised. Scene tasks then have as many queries as in control.

    Raises:
        ValueError: the split or a task is unknown.
    """
    check_split(split)
    return [_evaluation_task(split, task) for task in check_tasks(tasks)]


def _evaluation_task(split: str, task: str) -> EvaluationTask:
    count = QUERIES["control"] if split == "train" else None
    queries = load_pairs(split, tasks=[task], scenes_per_task=count)
    candidates = {pair.positive_id: pair.positive for pair in queries}
    if task in ("scenematch", "findscene"):
        distractors = _scene_distractors(split, task, queries)
    elif task == "vendor":
        shown = {pair.query.fields["name"] for pair in queries}
        others = [entity for entity in entities().values() if entity.name not in shown]
        others.sort(key=lambda entity: order("candidate", split, entity.key))
        names = [f"{e.train_vendors()[order('side', e.key) % len(e.train_vendors())]}/{e.key}" for e in others]
        distractors = [
            (f"picture:{name}", picture_item(name)) for name in names[: max(0, NAME_CANDIDATES - len(candidates))]
        ]
    else:
        distractors = [
            (f"text:{text}", text_item(text))
            for text in _text_distractors(split, task)
            if f"text:{text}" not in candidates
        ][: max(0, (NAME_CANDIDATES if task in ("name", "left1") else VALUE_CANDIDATES) - len(candidates))]
    candidates |= dict(distractors)
    return EvaluationTask(task, queries, list(candidates.values()), list(candidates))


def _text_distractors(split: str, task: str) -> list[str]:
    """Returns texts of the kind that answers the task. The most confusable ones come first, then in order of a hash."""
    if task in ("name", "left1"):
        first = {entity.name for entity in scene_vocabulary()} if task == "left1" else set()
        kinds = ("emoji",) if task == "left1" else ("emoji", "flag")
        texts = {entity.name for entity in entities().values() if entity.kind in kinds}
    else:
        first = set()
        texts = {value for country in countries() for value in country.attributes.values()}
    return sorted(texts, key=lambda text: (text not in first, order("candidate", split, task, text)))


def _scene_distractors(split: str, task: str, queries: Sequence[Pair]) -> list[tuple[str, Item]]:
    rng = random.Random(f"near/{task}/{split}")
    things, taken = scene_vocabulary(), {pair.positive_id for pair in queries}
    found: list[tuple[str, Item]] = []
    by_name = {entity.name: entity for entity in things}
    asked = [{pair.query.fields["first"], pair.query.fields["second"]} for pair in queries if task == "findscene"]
    for pair in queries:
        if len(found) == NEAR_MISSES.get(split, 0):
            break
        vendor, scene = _parse_scene(pair.positive)
        change = [by_name[pair.query.fields[key]] for key in ("first", "second")] if task == "findscene" else ()
        missed = near_miss(rng, scene, things, change=change)
        name = scene_name(vendor, tuple(entity.key for entity in missed))
        names = {entity.name for entity in missed}
        if f"picture:{name}" not in taken and not any(words <= names for words in asked):
            taken.add(f"picture:{name}")
            found.append((f"picture:{name}", picture_item(name)))
    return found


def _parse_scene(item: Item) -> tuple[str, Scene]:
    part = item.parts[0]
    assert isinstance(part, Image)
    assert isinstance(part.source, str)
    vendor, keys = part.source.removeprefix(PREFIX).split("/scene/")
    a, b, c, d = (entities()[key] for key in keys.split("+"))
    return vendor, (a, b, c, d)


def _pair(
    task: str, split: str, key: str, parts: tuple[Image | Text, ...], fields: dict[str, str], target: str, picture: bool
) -> Pair:
    spec = TASKS[task]
    return Pair(
        id=f"{task}/{split}/{key}",
        task=task,
        query=Item(spec.instruction, parts, fields | {"rationale": spec.render(fields)}),
        positive=picture_item(target) if picture else text_item(target),
        positive_id=f"picture:{target}" if picture else f"text:{target}",
    )


def _names(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    for entity in entities().values():
        held_out = [vendor for vendor in VENDORS if entity.withheld.get(vendor) == split]
        for vendor in entity.train_styles() if split == "train" else held_out:
            name = f"{vendor}/{entity.key}"
            yield _pair("name", split, name, (Image(PREFIX + name),), {"name": entity.name}, entity.name, False)


def _vendors(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    # Held-out splits: the withheld picture is the query or the target, in one direction per entity. With both
    # directions, a query's own picture would be among the candidates. Train: any two pictures that training may show,
    # at least one by a vendor, in both directions. A training query never shows what a held-out query shows.
    for entity in entities().values():
        held_out = (VENDORS, VENDORS[::-1])[order("direction", entity.key) % 2]
        if split == "train":
            directions = [each for each in permutations(entity.train_styles(), 2) if set(each) & set(VENDORS)]
            if entity.withheld:
                directions = [direction for direction in directions if direction[0] != held_out[0]]
        elif split in entity.withheld.values():
            directions = [held_out]
        else:
            continue
        for source, target in directions:
            shown, found = f"{source}/{entity.key}", f"{target}/{entity.key}"
            key = f"{source}-{target}/{entity.key}"
            yield _pair("vendor", split, key, (Image(PREFIX + shown),), {"name": entity.name}, found, True)


def _facts(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    for country in countries():
        for attribute in ATTRIBUTES:
            answer = country.attributes[attribute]
            fields = {"country": country.name, "attribute": attribute, "answer": answer}
            for number, text in enumerate(fact_phrasings(country.name, attribute, split)):
                key = f"{country.key}/{attribute}/{number}"
                yield _pair("fact", split, key, (Text(text),), fields, answer, False)


def _flag_attributes(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    for country in countries(split):
        for attribute in ATTRIBUTES:
            answer = country.attributes[attribute]
            fields = {"country": country.name, "attribute": attribute, "answer": answer}
            for vendor in country.train_vendors():
                parts = (Image(f"{PREFIX}{vendor}/{country.key}"), Text(flag_question(attribute)))
                yield _pair("flagattr", split, f"{vendor}/{country.key}/{attribute}", parts, fields, answer, False)


def _cells(scene: Sequence[Entity]) -> str:
    return caption([entity.name for entity in scene])


def _distinct(task: str, split: str, count: int, draw: Callable[[], Pair | None]) -> Iterator[Pair]:
    """Draws until there are ``count`` different pairs. ``draw`` returns None for a draw that does not fit."""
    seen = set[str]()
    for _ in range(1000 + 200 * count):
        if len(seen) == count:
            return
        pair = draw()
        if pair is not None and pair.id not in seen:
            seen.add(pair.id)
            yield pair
    if len(seen) < count:
        raise ValueError(
            f"scenes_per_task: task {task!r} has only {len(seen)} different queries in split {split!r}, but "
            f"{count} were requested; set a lower number"
        )


def _scene_matches(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    things = scene_vocabulary()

    def draw() -> Pair:
        scene = draw_scene(rng, things, split)
        keys = tuple(entity.key for entity in scene)
        source, target = rng.sample(VENDORS, 2)
        shown, found = scene_name(source, keys), scene_name(target, keys)
        return _pair("scenematch", split, shown, (Image(PREFIX + shown),), {"cells": _cells(scene)}, found, True)

    return _distinct("scenematch", split, count, draw)


def _find_scenes(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    things, shown, asked = scene_vocabulary(), set[frozenset[str]](), set[frozenset[str]]()

    def draw() -> Pair | None:
        first, second = rng.sample(things, 2)
        if mention_split(first, second) != split:
            return None
        scene = draw_scene(rng, things, split, fixed=(first, second))
        name = scene_name(rng.choice(VENDORS), tuple(entity.key for entity in scene))
        words = frozenset((first.key, second.key))
        held = {frozenset((a.key, b.key)) for a in scene for b in scene if a is not b}
        # In held-out splits, only the positive shows both things. In training, that would leave too few scenes.
        if split != "train" and (words in shown or held & asked):
            return None
        asked.add(words)
        shown.update(held)
        fields = {"first": first.name, "second": second.name}
        text = find_question(first.name, second.name)
        return _pair("findscene", split, f"{name}/{first.key}+{second.key}", (Text(text),), fields, name, True)

    return _distinct("findscene", split, count, draw)


def _left_neighbours(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    things = scene_vocabulary()

    def draw() -> Pair:
        scene, right = draw_scene(rng, things, split), rng.choice((1, 3))
        name = scene_name(rng.choice(VENDORS), tuple(entity.key for entity in scene))
        anchor, answer = scene[right].name, scene[right - 1].name
        fields = {"cells": _cells(scene), "scanned": _cells(scene[: right + 1]), "anchor": anchor, "answer": answer}
        parts = (Image(PREFIX + name), Text(left_question(anchor)))
        return _pair("left1", split, f"{name}/{right}", parts, fields, answer, False)

    return _distinct("left1", split, count, draw)


def _flag_scenes(split: str, rng: random.Random, count: int) -> Iterator[Pair]:
    things, flags = scene_vocabulary(), countries(split)

    def draw() -> Pair:
        country, attribute = rng.choice(flags), rng.choice(ATTRIBUTES)
        scene = draw_scene(rng, things, split, fixed=(country,), at_left=True)
        name = scene_name(rng.choice(country.train_vendors()), tuple(entity.key for entity in scene))
        right = scene.index(country) + 1
        anchor, answer = scene[right].name, country.attributes[attribute]
        fields = {
            "cells": _cells(scene),
            "scanned": _cells(scene[: right + 1]),
            "anchor": anchor,
            "country": country.name,
            "attribute": attribute,
            "answer": answer,
        }
        parts = (Image(PREFIX + name), Text(flag_scene_question(attribute, anchor)))
        return _pair("flagscene", split, f"{name}/{attribute}", parts, fields, answer, False)

    return _distinct("flagscene", split, count, draw)


_BUILDERS: dict[str, Callable[[str, random.Random, int], Iterator[Pair]]] = {
    "name": _names,
    "vendor": _vendors,
    "fact": _facts,
    "scenematch": _scene_matches,
    "findscene": _find_scenes,
    "flagattr": _flag_attributes,
    "left1": _left_neighbours,
    "flagscene": _flag_scenes,
}
