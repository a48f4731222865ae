"""Makes next-token data for pretraining the default backbone, and probes that measure what it has learnt.

Pretraining teaches perception and memory only:

- names of pictures
- facts in text
- captions of scenes, whole or up to a thing asked for
- neighbours in a text

It never shows a withheld picture, or a held-out scene or phrasing. It never asks for a composition: the attribute of a
flag, or the neighbour of a thing in a picture. One caveat: a caption that ends at a thing names its left neighbour just
before, although the question is not about the neighbour.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

from mmemb.data.bundled.entities import (
    ATTRIBUTES,
    VENDORS,
    Entity,
    check_split,
    countries,
    entities,
    scene_vocabulary,
)
from mmemb.data.bundled.pairs import load_pairs, text_item
from mmemb.data.bundled.pictures import PREFIX, scene_name
from mmemb.data.bundled.scenes import Scene, draw_scene
from mmemb.data.bundled.tasks import (
    ANSWER,
    DESCRIBE,
    FACT_PHRASINGS,
    FIND_PHRASINGS,
    TASKS,
    caption,
    fact_phrasings,
    find_thing,
)
from mmemb.types import Image, Item, Pair, Part, Text

SIZE = 10_000_000
"""Length of `PretrainingSamples`: more than any run draws. A sample is made on access."""


WEIGHTS = {"picture": 0.54, "scene": 0.2, "fact": 0.1, "text_scene": 0.16, "find": 0.8}
"""How often each pretraining task is drawn, relative to the others."""


def reverse_question(attribute: str, value: str) -> str:
    """Returns the question for the only country that has a value."""
    return f"which country has the {attribute} {value} ?"


def neighbours_text(names: Sequence[str], asked: Sequence[int]) -> str:
    """Returns the caption of a scene, then the neighbour in the same row of each cell in ``asked``."""
    said = (f"{'left' if cell % 2 else 'right'} of {names[cell]} : {names[cell ^ 1]}" for cell in asked)
    return " ; ".join((caption(names), *said))


class PretrainingSamples:
    """A map-style data set without end in practice: ``samples[i]`` is a pure function of the seed and i.

    The query is a prompt. The positive is one text, the response that the model should write. The tasks:

    - ``picture``: a single picture -> its name. Half of the emoji have left and right exchanged.
    - ``scene``: a newly drawn training scene -> its caption.
    - ``fact``: a question in text -> the value. A tenth of them are reversed: value -> country.
    - ``text_scene``: a caption in text -> the same caption, then left or right neighbours.
    - ``find``: a newly drawn training scene and a thing in it -> its caption up to that thing.

    Args:
        seed: seed of all draws.
        tasks: tasks to draw. By default, all. A task that is named several times is drawn that many times as often.

    Raises:
        ValueError: ``tasks`` is empty or has an unknown task.
    """

    def __init__(self, seed: int = 0, *, tasks: Sequence[str] | None = None) -> None:
        self.seed = seed
        self.tasks = tuple(WEIGHTS if tasks is None else tasks)
        if not self.tasks or not set(self.tasks) <= WEIGHTS.keys():
            asked = ", ".join(self.tasks) or "none"
            raise ValueError(f"pretraining tasks: got {asked}; choose from {', '.join(WEIGHTS)}")

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < SIZE:
            raise IndexError(index)
        rng = random.Random(f"pretraining/{self.seed}/{index}")
        (task,) = rng.choices(self.tasks, [WEIGHTS[task] for task in self.tasks])
        make = {
            "picture": self._picture,
            "scene": self._scene,
            "fact": self._fact,
            "text_scene": self._text_scene,
            "find": self._find,
        }[task]
        return make(rng, f"{self.seed}/{index}")

    @cached_property
    def _train_pictures(self) -> list[tuple[str, Entity]]:
        return [(vendor, entity) for entity in entities().values() for vendor in entity.train_styles()]

    @cached_property
    def _things(self) -> list[Entity]:
        return scene_vocabulary()

    @cached_property
    def _countries(self) -> list[Entity]:
        return countries()

    @cached_property
    def _unique_values(self) -> list[tuple[str, str, str]]:
        values = [(a, c.attributes[a], c.name) for c in countries() for a in ATTRIBUTES]
        counts: dict[tuple[str, str], int] = {}
        for attribute, value, _ in values:
            counts[attribute, value] = counts.get((attribute, value), 0) + 1
        return [row for row in values if counts[row[0], row[1]] == 1]

    def _picture(self, rng: random.Random, key: str) -> Pair:
        style, entity = rng.choice(self._train_pictures)
        # The same thing may face left or right, depending on the style. The sides of a flag are fixed.
        mirrored = "mirrored/" if entity.kind == "emoji" and rng.random() < 0.5 else ""
        return describe("picture", key, f"{style}/{mirrored}{entity.key}", entity.name)

    def _draw(self, rng: random.Random) -> tuple[str, Scene]:
        # Half of the scenes show a flag, as in `flagscene`. Any country may occur: only flag -> attribute is held out.
        if rng.random() < 0.5:
            return rng.choice(VENDORS), draw_scene(rng, self._things, "train")
        country = rng.choice(self._countries)
        return rng.choice(country.train_vendors()), draw_scene(rng, self._things, "train", fixed=(country,))

    def _scene(self, rng: random.Random, key: str) -> Pair:
        vendor, scene = self._draw(rng)
        name = scene_name(vendor, tuple(entity.key for entity in scene))
        return describe("scene", key, name, caption([entity.name for entity in scene]))

    def _fact(self, rng: random.Random, key: str) -> Pair:
        if rng.random() < 0.1:
            attribute, value, country = rng.choice(self._unique_values)
            return answer("fact", key, reverse_question(attribute, value), country)
        place, attribute = rng.choice(self._countries), rng.choice(ATTRIBUTES)
        question = rng.choice(fact_phrasings(place.name, attribute, "train"))
        return answer("fact", key, question, place.attributes[attribute])

    def _text_scene(self, rng: random.Random, key: str) -> Pair:
        # Two questions per sample, left or right. With one, the model guessed between the left-hand cells for long.
        _, scene = self._draw(rng)
        names = [entity.name for entity in scene]
        return answer("text_scene", key, caption(names), neighbours_text(names, rng.sample(range(4), 2)))

    def _find(self, rng: random.Random, key: str) -> Pair:
        vendor, scene = self._draw(rng)
        name, cell = scene_name(vendor, tuple(entity.key for entity in scene)), rng.randrange(4)
        return find(key, name, [entity.name for entity in scene], cell, rng.randrange(len(FIND_PHRASINGS)))


def find(key: str, picture: str, names: Sequence[str], cell: int, phrasing: int = 0) -> Pair:
    """Makes a pair: a scene and a question for one of its things -> the caption that ends at this thing."""
    return describe("find", key, picture, caption(names[: cell + 1]), asked=find_thing(names[cell], phrasing))


def describe(task: str, key: str, picture: str, response: str, *, asked: str | None = None) -> Pair:
    """Makes a pair: a picture, perhaps with a question -> the text that describes it."""
    parts: tuple[Part, ...] = (Image(PREFIX + picture), *(() if asked is None else (Text(asked),)))
    query = Item(DESCRIBE, parts)
    return Pair(f"pretraining/{task}/{key}", task, query, text_item(response), f"text:{response}")


def answer(task: str, key: str, question: str, response: str) -> Pair:
    """Makes a pair: a question in text -> its answer."""
    query = Item(ANSWER, (Text(question),))
    return Pair(f"pretraining/{task}/{key}", task, query, text_item(response), f"text:{response}")


def is_right(task: str, response: str, given: str) -> bool:
    """Whether a model's answer to a pretraining prompt of a task is as good as the response.

    The answer must equal the response. For ``text_scene``, the model chooses itself which neighbours to name. Its
    answer must be the caption and at least one neighbour, all of them correct.
    """
    if task != "text_scene":
        return given == response
    wanted, found = response.split(" ; "), given.split(" ; ")
    every = neighbours_text(wanted[0].split(" , "), range(4)).split(" ; ")
    return found[0] == wanted[0] and len(found) > 1 and set(found) <= set(every)


def probe_samples(split: str) -> list[Pair]:
    """Makes probes for what a pretrained model should know about a split, as prompts of pretraining.

    - ``picture``: a withheld picture -> its name.
    - ``fact``: a phrasing of the split -> the value.
    - ``scene``: a scene of the split -> its caption.
    - ``text_scene``: the caption of a scene of the split -> the same caption with the left neighbours.
    - ``find``: a scene and one of its right-hand things -> the caption up to that thing.

    Raises:
        ValueError: the split is unknown.
    """
    check_split(split)
    probes = []
    tasks = ["name", "fact", "scenematch", "left1"]
    for pair in load_pairs(split, tasks=tasks, scenes_per_task=100 if split == "train" else None):
        part = pair.query.parts[0]
        if pair.task == "left1" and isinstance(part, Image):
            names = pair.query.fields["cells"].split(" , ")
            probes.append(answer("text_scene", f"probe/{pair.id}", caption(names), neighbours_text(names, (1, 3))))
            picture, seen = str(part.source).removeprefix(PREFIX), pair.query.fields["scanned"].count(" , ")
            probes.append(find(f"probe/{pair.id}", picture, names, seen))
            continue
        if isinstance(part, Image):
            name = str(part.source).removeprefix(PREFIX)
            task, response = (
                ("scene", pair.query.fields["cells"]) if "/scene/" in name else ("picture", pair.query.fields["name"])
            )
            probes.append(describe(task, f"probe/{pair.id}", name, response))
        elif isinstance(part, Text):
            probes.append(answer("fact", f"probe/{pair.id}", part.text, pair.query.fields["answer"]))
    return probes


def all_texts() -> list[str]:
    """Returns the texts that a tokenizer must cover: names, values, instructions, and filled question templates."""
    texts = {entity.name for entity in entities().values()} | {v for c in countries() for v in c.attributes.values()}
    texts |= {spec.instruction for spec in TASKS.values()} | {DESCRIBE, *ATTRIBUTES}
    country, (a, b) = countries()[0], scene_vocabulary()[:2]
    for attribute in ATTRIBUTES:
        texts |= {phrasing.format(country=country.name, attribute=attribute) for phrasing in FACT_PHRASINGS}
        texts.add(reverse_question(attribute, country.attributes[attribute]))
    texts.add(neighbours_text([a.name, b.name], [0, 1]))
    for pair in load_pairs("validation", scenes_per_task=1):
        texts |= {part.text for part in pair.query.parts if isinstance(part, Text)} | {pair.query.fields["rationale"]}
    return sorted(texts)
