"""The texts of the eight tasks: instructions, phrasings, and a template for the true rationale.

All generated text is lower case with blanks around punctuation, so that a vocabulary of a few hundred words is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmemb.data.bundled.entities import order


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """The texts of a task.

    Attributes:
        instruction: the query's instruction, at most eight words.
        kind: ``easy`` (perception or memory alone), ``hop`` (perceive, then recall), ``spatial`` (look around first).
        rationale: template with the query's fields. It renders the shortest text that contains the answer.
    """

    instruction: str
    kind: Literal["easy", "hop", "spatial"]
    rationale: str

    def render(self, fields: Mapping[str, str]) -> str:
        """Returns the true rationale of a query with these fields."""
        return self.rationale.format_map(fields)


TASKS: dict[str, TaskSpec] = {
    "name": TaskSpec("what is shown ?", "easy", "{name}"),
    "vendor": TaskSpec("find the same thing in another style", "easy", "{name}"),
    "fact": TaskSpec("answer the question", "easy", "{country} {attribute} : {answer}"),
    "scenematch": TaskSpec("find the same scene in another style", "easy", "{cells}"),
    "findscene": TaskSpec("find the scene", "easy", "{first} and {second}"),
    "flagattr": TaskSpec("answer about the flag", "hop", "{country} ; {attribute} : {answer}"),
    "left1": TaskSpec("answer about the scene", "spatial", "{scanned} : {answer}"),
    "flagscene": TaskSpec("answer about the scene", "spatial", "{scanned} : {country} ; {attribute} : {answer}"),
}
"""The tasks by name. ``scenematch``, ``findscene``, ``left1`` and ``flagscene`` draw their scenes from a seed.

``{scanned}`` is the caption up to the cell of the question. The thing to its left is then always the second to last
name, so the model only has to learn where to stop.
"""

SCENE_TASKS = ("scenematch", "findscene", "left1", "flagscene")

DESCRIBE = "describe the picture"
"""Instruction of samples picture -> text in pretraining."""

ANSWER = TASKS["fact"].instruction

FACT_PHRASINGS = (
    "{attribute} of {country}",
    "what is the {attribute} of {country} ?",
    "{country} : {attribute}",
    "which {attribute} has {country} ?",
    "name the {attribute} of {country}",
    "tell me {country} and its {attribute}",
)
_PHRASING_SPLITS = ("train", "train", "train", "control", "validation", "test")


def fact_phrasings(country: str, attribute: str, split: str) -> list[str]:
    """Returns the questions for a fact in a split: three in train, one elsewhere. A hash of the fact rotates them."""
    shift = order("phrasing, second draw", country, attribute)
    return [
        template.format(country=country, attribute=attribute)
        for i, template in enumerate(FACT_PHRASINGS)
        if _PHRASING_SPLITS[(i + shift) % len(FACT_PHRASINGS)] == split
    ]


def flag_question(attribute: str) -> str:
    """Returns the text of a ``flagattr`` query."""
    return f"what is the {attribute} ?"


def left_question(anchor: str) -> str:
    """Returns the text of a ``left1`` query."""
    return f"what is left of the {anchor} ?"


def flag_scene_question(attribute: str, anchor: str) -> str:
    """Returns the text of a ``flagscene`` query."""
    return f"{attribute} of the flag left of the {anchor}"


def find_question(first: str, second: str) -> str:
    """Returns the text of a ``findscene`` query."""
    return f"find a picture with {first} and {second}"


FIND_PHRASINGS = ("find the {name}", "what is the {name} ?", "tell me of the {name}", "a picture with the {name}")
"""Questions for a thing in the picture of a scene, in pretraining. Probes use the first one."""


def find_thing(name: str, phrasing: int = 0) -> str:
    """Returns the question for a thing in one of `FIND_PHRASINGS`."""
    return FIND_PHRASINGS[phrasing].format(name=name)


def caption(names: Sequence[str]) -> str:
    """Returns the caption of a scene: its cells in reading order."""
    return " , ".join(names)
