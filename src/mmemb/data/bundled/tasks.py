"""The eight tasks in words: instructions, phrasings, and the template that renders each true rationale.

All generated text is lower case and its punctuation stands apart, so that a vocabulary of some hundred words holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmemb.data.bundled.entities import order


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task in words.

    Attributes:
        instruction: the query's instruction, at most eight words.
        kind: ``easy`` (perception or memory alone), ``hop`` (perceive, then recall), ``spatial`` (look around first).
        rationale: template over the query's fields: the shortest text from which the answer can be read off.
    """

    instruction: str
    kind: Literal["easy", "hop", "spatial"]
    rationale: str

    def render(self, fields: Mapping[str, str]) -> str:
        """The true rationale of a query with these fields."""
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

``{scanned}`` is the caption up to the cell asked about: what is left of that is then always the last name but one, so
that the one thing to learn is where to stop.
"""

SCENE_TASKS = ("scenematch", "findscene", "left1", "flagscene")

DESCRIBE = "describe the picture"
"""Instruction of picture -> text samples in pretraining."""

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
    """The questions for one fact in a split: three in train, one in each other, rotated by a hash of the fact."""
    shift = order("phrasing, second draw", country, attribute)
    return [
        template.format(country=country, attribute=attribute)
        for i, template in enumerate(FACT_PHRASINGS)
        if _PHRASING_SPLITS[(i + shift) % len(FACT_PHRASINGS)] == split
    ]


def flag_question(attribute: str) -> str:
    """The text of a ``flagattr`` query."""
    return f"what is the {attribute} ?"


def left_question(anchor: str) -> str:
    """The text of a ``left1`` query."""
    return f"what is left of the {anchor} ?"


def flag_scene_question(attribute: str, anchor: str) -> str:
    """The text of a ``flagscene`` query."""
    return f"{attribute} of the flag left of the {anchor}"


def find_question(first: str, second: str) -> str:
    """The text of a ``findscene`` query."""
    return f"find a picture with {first} and {second}"


FIND_PHRASINGS = ("find the {name}", "what is the {name} ?", "tell me of the {name}", "a picture with the {name}")
"""What to look for in the picture of a scene, in pretraining; the probes ask in the first."""


def find_thing(name: str, phrasing: int = 0) -> str:
    """Asks for a thing in one of `FIND_PHRASINGS`."""
    return FIND_PHRASINGS[phrasing].format(name=name)


def caption(names: Sequence[str]) -> str:
    """The caption of a scene: its cells in reading order."""
    return " , ".join(names)
