"""No selection: a pair trains on every candidate it has."""

from __future__ import annotations

import random

from mmemb.interfaces import Selector
from mmemb.types import Candidates, Selection


class All(Selector, name="all"):
    """Trains every candidate of a pair in every step, each at an equal share of the pair's weight.

    What selection has to beat when compute is no matter: the reasoned path costs K rows a pair instead of one, so
    lower the objective's ``chunk_size``.
    """

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """One candidate, drawn uniformly, for whoever wants one alone (see `Selector.select`)."""
        count = len(candidates.rationales)
        return Selection(random.Random(seed).randrange(count) if count else None)

    def select_many(self, candidates: Candidates, *, seed: int) -> tuple[Selection, ...]:
        """Every candidate."""
        count = len(candidates.rationales)
        return tuple(Selection(index, 1 / count) for index in range(count))
