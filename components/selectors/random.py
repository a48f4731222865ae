"""The selector that draws any candidate: the baseline."""

from __future__ import annotations

import random

from mmemb.interfaces import Selector
from mmemb.types import Candidates, Selection


class Random(Selector, name="random"):
    """Draws uniformly among the candidates and ignores their scores: the baseline.

    Summaries of MMEmb-R1 (arXiv 2604.06156) report this baseline.

    Args:
        seed: seed of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`."""
        if not candidates.rationales:
            return Selection(None)
        return Selection(random.Random(f"{self.seed}/{seed}").randrange(len(candidates.rationales)))
