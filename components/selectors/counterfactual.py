"""The selector from the paper: it keeps candidates that help this pair and prefers those that help more."""

from __future__ import annotations

import math
import random

from mmemb.common.checks import check_numbers
from mmemb.interfaces import Selector
from mmemb.rationales.gains import surviving
from mmemb.types import Candidates, Selection


class Counterfactual(Selector, name="counterfactual"):
    """Samples among the candidates whose gain over no rationale exceeds a margin.

    If no candidate exceeds it, the pair trains only the direct path. The gain is the effect of the counterfactual
    intervention of MMEmb-R1 (arXiv 2604.06156):

        gain(r) = c(q, t | do(r)) - c(q, t | do(none)).

    A candidate r is kept if gain(r) > margin. It is drawn with probability proportional to exp(gain(r) / temperature),
    as summaries of the paper report.

    Args:
        margin: gain that a candidate must exceed, in the evaluator's unit (nats).
        temperature: temperature of the draw, in the same unit, > 0; small values approach the arg-max.
        net_of_placebo: whether to subtract from each gain the gain of another pair's rationale
            (`mmemb.rationales.gains`).
    """

    def __init__(self, margin: float = 0.0, temperature: float = 0.1, net_of_placebo: bool = False) -> None:
        check_numbers("selectors.counterfactual", above=0, temperature=temperature)
        self.margin = margin
        self.temperature = temperature
        self.net_of_placebo = net_of_placebo

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        kept = surviving(candidates, margin=self.margin, net_of_placebo=self.net_of_placebo)
        if not kept:
            return Selection(None)
        best = max(kept.values())
        # Relative to the best, so that nothing overflows; `==` first, because inf - inf is nan.
        shares = [1.0 if gain == best else math.exp((gain - best) / self.temperature) for gain in kept.values()]
        return Selection(random.Random(seed).choices(list(kept), weights=shares)[0])
