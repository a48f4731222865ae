"""The selector that takes the candidate with the best score, even if none helps."""

from __future__ import annotations

from mmemb.interfaces import Selector
from mmemb.rationales.pool import scored
from mmemb.types import Candidates, Selection


class Oracle(Selector, name="oracle"):
    """Takes the candidate that best fits the true target, the arg-max of c(q, t | do(r)), even if none helps.

    Summaries of MMEmb-R1 (arXiv 2604.06156) report such a selector as the upper bound. ``counterfactual`` reads the
    same scores and may take none, so here it is a comparison, not a bound. Of equally good candidates the first is
    taken.
    """

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        scores = scored(candidates)
        return Selection(max(range(len(scores)), key=scores.__getitem__) if scores else None)
