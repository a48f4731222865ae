"""The paper's selector: keep what helps this pair, prefer what helps more."""

from __future__ import annotations

import math
import random

from mmemb.common.checks import check_numbers
from mmemb.interfaces import Selector
from mmemb.rationales.gains import surviving
from mmemb.types import Candidates, Selection


class Counterfactual(Selector, name="counterfactual"):
    """Samples among the candidates whose gain over no rationale exceeds a margin; none survives: direct path only.

    With the gain of the counterfactual intervention [A]

        gain(r) = c(q, t | do(r)) - c(q, t | do(none)),

    r is kept where gain(r) > margin, and drawn with probability proportional to exp(gain(r) / temperature) [S].

    Args:
        margin: least gain, in the evaluator's unit (nats).
        temperature: of the draw, in the same unit, > 0; small values approach the arg-max.
        net_of_placebo: takes from each gain what another pair's rationale would have gained (`mmemb.rationales.gains`).
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
