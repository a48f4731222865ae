"""Best of K: the candidate that helps most, if one helps."""

from __future__ import annotations

from mmemb.interfaces import Selector
from mmemb.rationales.gains import surviving
from mmemb.types import Candidates, Selection


class BestOf(Selector, name="best_of"):
    """Takes the candidate of the largest gain; if that does not exceed the margin, the pair trains the direct path.

    What ``counterfactual`` becomes at temperature 0. Unlike ``oracle`` it leaves out what harms. The first of equals is
    taken.

    Args:
        margin: least gain, in the evaluator's unit (nats).
        net_of_placebo: takes from each gain what another pair's rationale would have gained (`mmemb.rationales.gains`).
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
