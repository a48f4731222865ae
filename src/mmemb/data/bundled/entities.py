"""The entities of the bundled data set: their pictures, their names, and the splits that may show them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from mmemb.common.digests import number_of

SPLITS = ("train", "control", "validation", "test")
VENDORS = ("noto", "twemoji")
TRAINING_STYLES = ("fluent", "emojione", "fxemoji", "fluent-color", "streamline")
"""Further styles, shown in training only. None of their pictures is withheld or in a held-out query or candidate."""
STYLES = (*VENDORS, *TRAINING_STYLES)
ATTRIBUTES = ("currency", "language", "region")


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing or a country that both vendors have drawn.

    Attributes:
        key: code points in hexadecimal, joined by ``-``. The picture is ``<vendor>/<key>``.
        name: its name: unique, lower case, at most three words.
        category: ``animal``, ``food`` and so on. ``flag`` for countries.
        kind: ``emoji`` or ``flag``.
        withheld: vendor -> the held-out split that its picture belongs to. At most one vendor, so that the other
            vendor's picture is for training.
        scene: whether scenes may show it. If so, the pictures of both vendors are training pictures.
        split: for a country, the split of its flag -> attribute compositions. ``train`` otherwise.
        attributes: for a country, its currency, language and region.
        styles: further styles that have a picture of it.
    """

    key: str
    name: str
    category: str
    kind: str
    withheld: Mapping[str, str] = field(default_factory=dict)
    scene: bool = False
    split: str = "train"
    attributes: Mapping[str, str] = field(default_factory=dict)
    styles: tuple[str, ...] = ()

    def train_vendors(self) -> tuple[str, ...]:
        """Returns the vendors whose picture every split may show: one or two."""
        return tuple(vendor for vendor in VENDORS if vendor not in self.withheld)

    def train_styles(self) -> tuple[str, ...]:
        """Returns the styles that training may show: vendors that are not withheld, and the further styles."""
        return (*self.train_vendors(), *self.styles)


@cache
def entities() -> Mapping[str, Entity]:
    """Returns all entities by key, in the order of the data file."""
    table = json.loads((resources.files(__package__) / "entities.json").read_text(encoding="utf-8"))["entities"]
    known = Entity.__dataclass_fields__.keys()
    rows = {key: {**row, "styles": tuple(row.get("styles", ()))} for key, row in table.items()}
    return {key: Entity(key=key, **{k: v for k, v in row.items() if k in known}) for key, row in rows.items()}


def countries(split: str | None = None) -> list[Entity]:
    """Returns the countries, or only those of one composition split."""
    return [entity for entity in entities().values() if entity.kind == "flag" and split in (None, entity.split)]


def scene_vocabulary() -> list[Entity]:
    """Returns the things that scenes may show, without the flags."""
    return [entity for entity in entities().values() if entity.scene and entity.kind == "emoji"]


def check_split(split: str) -> str:
    """Returns the split if there is one of this name.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the bundled data; choose one of: {', '.join(SPLITS)}")
    return split


def order(*parts: object) -> int:
    """Hashes its arguments to a 64-bit number. The number is the same in every process and on every machine."""
    return number_of("/".join(map(str, parts)))
