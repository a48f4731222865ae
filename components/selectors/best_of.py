"""The selector that takes the rationale candidate that helps most, if one helps (best of K)."""

from __future__ import annotations

from mmemb.interfaces import Selector
from mmemb.rationales.gains import surviving
from mmemb.types import Candidates, Selection


class BestOf(Selector, name="best_of"):
    """Takes the candidate with the largest gain, or none if that gain does not exceed the margin.

    Without a candidate the pair trains only the direct path. This is ``counterfactual`` at temperature 0. Unlike
    ``oracle`` it leaves out candidates that harm. Of equally good candidates the first is taken.

    Args:
        margin: gain that a candidate must exceed, in the evaluator's unit (nats).
        net_of_placebo: whether to subtract from each gain the gain of another pair's rationale
            (`mmemb.rationales.gains`).
    """

    def __init__(self, margin: float = 0.0, net_of_placebo: bool = False) -> None:
        self.margin = margin
        self.net_of_placebo = net_of_placebo

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        kept = surviving(candidates, margin=self.margin, net_of_placebo=self.net_of_placebo)
        return Selection(max(kept, key=kept.__getitem__, default=None))
