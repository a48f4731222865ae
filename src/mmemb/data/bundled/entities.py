"""The entities of the bundled data set: what is drawn, what it is called, and which split may show it."""

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
"""Further styles, shown in training only: without withheld pictures or a place in a held-out query or candidate."""
STYLES = (*VENDORS, *TRAINING_STYLES)
ATTRIBUTES = ("currency", "language", "region")


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing or a country, drawn by both vendors.

    Attributes:
        key: code points in hexadecimal, joined by ``-``; the picture is ``<vendor>/<key>``.
        name: what it is called: unique, lower case, at most three words.
        category: ``animal``, ``food``, ...; ``flag`` for countries.
        kind: ``emoji`` or ``flag``.
        withheld: the held-out split a vendor's picture belongs to; at most one vendor: the other is for training.
        scene: scenes may show it (both vendors' pictures are training pictures).
        split: of a country: where its flag -> attribute compositions belong; ``train`` otherwise.
        attributes: of a country: currency, language, region.
        styles: further styles that draw it, too.
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
        """Vendors whose picture every split may show: one or two."""
        return tuple(vendor for vendor in VENDORS if vendor not in self.withheld)

    def train_styles(self) -> tuple[str, ...]:
        """Styles that training may show it in: the vendors not withheld, and the further styles that have it."""
        return (*self.train_vendors(), *self.styles)


@cache
def entities() -> Mapping[str, Entity]:
    """Every entity by key, in the order of the data file."""
    table = json.loads((resources.files(__package__) / "entities.json").read_text(encoding="utf-8"))["entities"]
    known = Entity.__dataclass_fields__.keys()
    rows = {key: {**row, "styles": tuple(row.get("styles", ()))} for key, row in table.items()}
    return {key: Entity(key=key, **{k: v for k, v in row.items() if k in known}) for key, row in rows.items()}


def countries(split: str | None = None) -> list[Entity]:
    """The countries, of one composition split if given."""
    return [entity for entity in entities().values() if entity.kind == "flag" and split in (None, entity.split)]


def scene_vocabulary() -> list[Entity]:
    """The things scenes are made of (flags apart)."""
    return [entity for entity in entities().values() if entity.scene and entity.kind == "emoji"]


def check_split(split: str) -> str:
    """The split itself.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the bundled data; choose one of: {', '.join(SPLITS)}")
    return split


def order(*parts: object) -> int:
    """A stable pseudo-random number of its arguments, 64 bits: the same in every process and on every machine."""
    return number_of("/".join(map(str, parts)))
