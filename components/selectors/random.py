"""The baseline: any candidate will do."""

from __future__ import annotations

import random

from mmemb.interfaces import Selector
from mmemb.types import Candidates, Selection


class Random(Selector, name="random"):
    """Draws uniformly over the candidates, whatever their scores: the baseline [S].

    Args:
        seed: another seed makes other draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`."""
        if not candidates.rationales:
            return Selection(None)
        return Selection(random.Random(f"{self.seed}/{seed}").randrange(len(candidates.rationales)))
