"""Draws scenes of four entities from a seed. Splits share no scene.

A hash of the *set* of four entities determines the split. So training never shows a held-out scene, not even rearranged
or drawn by the other vendor. `findscene` asks for two entities in words, and a hash of the two determines their split
in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmemb.data.bundled.entities import Entity, order

Scene = tuple[Entity, Entity, Entity, Entity]
"""Four distinct entities in reading order: top left, top right, bottom left, bottom right."""

# Upper bounds in percent. There are few pairs (80 choose 2 = 3160), so held-out splits get a larger share of them.
_SCENE_SHARES = (("train", 70), ("control", 80), ("validation", 90), ("test", 100))
_PAIR_SHARES = (("train", 60), ("control", 78), ("validation", 84), ("test", 100))


def _assign(shares: Sequence[tuple[str, int]], *parts: object) -> str:
    place = order(*parts) % 100
    return next(split for split, bound in shares if place < bound)


def scene_split(scene: Sequence[Entity]) -> str:
    """Returns the split of a scene. It does not depend on the arrangement."""
    return _assign(_SCENE_SHARES, "scene", *sorted(entity.key for entity in scene))


def mention_split(first: Entity, second: Entity) -> str:
    """Returns the split in which a query may name these two entities together, in either order."""
    return _assign(_PAIR_SHARES, "mention", *sorted((first.key, second.key)))


def draw_scene(
    rng: random.Random, things: Sequence[Entity], split: str, *, fixed: Sequence[Entity] = (), at_left: bool = False
) -> Scene:
    """Draws a scene of a split.

    Args:
        rng: source of randomness.
        things: entities for the other cells.
        split: split that the scene must belong to.
        fixed: entities that the scene must show.
        at_left: whether the first of ``fixed`` must be in a left-hand cell.
    """
    while True:
        others = rng.sample(things, 4 - len(fixed))
        cells = [*fixed, *others]
        if len({entity.key for entity in cells}) < 4 or scene_split(cells) != split:
            continue
        rng.shuffle(cells)
        if at_left:
            now, left = cells.index(fixed[0]), rng.choice((0, 2))
            cells[now], cells[left] = cells[left], cells[now]
        return (cells[0], cells[1], cells[2], cells[3])


def near_miss(rng: random.Random, scene: Scene, things: Sequence[Entity], *, change: Sequence[Entity] = ()) -> Scene:
    """Draws a scene of the same split that differs a little from the given one: two cells swapped, or one replaced.

    Args:
        rng: source of randomness.
        scene: the scene to change.
        things: entities that may replace a cell.
        change: if given, one of these entities is replaced and no cells are swapped, so that one of them is missing.
    """
    cells = list(scene)
    if not change and rng.random() < 0.5:
        i, j = rng.sample(range(4), 2)
        cells[i], cells[j] = cells[j], cells[i]
        return (cells[0], cells[1], cells[2], cells[3])
    split = scene_split(scene)
    while True:
        cells = list(scene)
        target = rng.choice(change) if change else rng.choice(cells)
        cells[cells.index(target)] = rng.choice(things)
        if len(set(map(id, cells))) == 4 and cells != list(scene) and scene_split(cells) == split:
            return (cells[0], cells[1], cells[2], cells[3])
