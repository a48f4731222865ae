"""The selector that takes the candidate with the best score: the upper bound."""

from __future__ import annotations

from mmemb.interfaces import Selector
from mmemb.rationales.pool import scored
from mmemb.types import Candidates, Selection


class Oracle(Selector, name="oracle"):
    """Takes the candidate that best fits the true target, the arg-max of c(q, t | do(r)): the upper bound.

    Summaries of MMEmb-R1 (arXiv 2604.06156) report this bound. Unlike ``counterfactual`` it always takes a candidate if
    there is one, even if none helps. Of equally good candidates the first is taken.
    """

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        scores = scored(candidates)
        return Selection(max(range(len(scores)), key=scores.__getitem__) if scores else None)
