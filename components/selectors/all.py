"""The selector that selects nothing: a pair trains on all of its rationale candidates."""

from __future__ import annotations

import random

from mmemb.interfaces import Selector
from mmemb.types import Candidates, Selection


class All(Selector, name="all"):
    """Trains on every rationale candidate of a pair in every step, each with an equal share of the pair's weight.

    This is the baseline for selection when compute does not matter. The reasoned path costs K rows per pair instead of
    one, so lower the objective's ``chunk_size``.
    """

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """One candidate, drawn uniformly, for callers that need a single one (see `Selector.select`)."""
        count = len(candidates.rationales)
        return Selection(random.Random(seed).randrange(count) if count else None)

    def select_many(self, candidates: Candidates, *, seed: int) -> tuple[Selection, ...]:
        """Every candidate."""
        count = len(candidates.rationales)
        return tuple(Selection(index, 1 / count) for index in range(count))
