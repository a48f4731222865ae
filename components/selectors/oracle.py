"""The upper bound: what the evaluator likes best."""

from __future__ import annotations

from mmemb.interfaces import Selector
from mmemb.rationales.pool import scored
from mmemb.types import Candidates, Selection


class Oracle(Selector, name="oracle"):
    """Takes the candidate that best aligns with the true target: arg-max of c(q, t | do(r)), the upper bound [S].

    Unlike ``counterfactual`` it always reasons where there is a candidate, even where none helps. The first of equals
    is taken.
    """

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        scores = scored(candidates)
        return Selection(max(range(len(scores)), key=scores.__getitem__) if scores else None)
