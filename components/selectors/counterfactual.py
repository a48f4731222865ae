"""The paper's selector: keep what helps this pair, prefer what helps more."""

from __future__ import annotations

import math
import random

from mmemb.data.pool import scored
from mmemb.interfaces import Selector
from mmemb.types import Candidates, Selection


class Counterfactual(Selector, name="counterfactual"):
    """Samples among the candidates whose gain over no rationale exceeds a margin; none survives: direct path only.

    With the gain of the counterfactual intervention [A]

        gain(r) = c(q, t | do(r)) - c(q, t | do(none)),

    r is kept where gain(r) > margin, and drawn with probability proportional to exp(gain(r) / temperature) [S].

    Args:
        margin: least gain, in the evaluator's unit (log-probability).
        temperature: of the draw, in the same unit, > 0; small values approach the arg-max.
    """

    def __init__(self, margin: float = 0.0, temperature: float = 0.1) -> None:
        if not temperature > 0:
            raise ValueError(f"counterfactual: temperature is {temperature}, expected > 0 (a small one nears arg-max)")
        self.margin = margin
        self.temperature = temperature

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """See `Selector.select`.

        Raises:
            ValueError: the candidates have not been scored.
        """
        gains = [score - candidates.score_none for score in scored(candidates)]
        kept = [index for index, gain in enumerate(gains) if gain > self.margin]
        if not kept:
            return Selection(None)
        best = max(gains[index] for index in kept)
        # Relative to the best, so that nothing overflows; `==` first, because inf - inf is nan.
        shares = [1.0 if gains[i] == best else math.exp((gains[i] - best) / self.temperature) for i in kept]
        return Selection(random.Random(seed).choices(kept, weights=shares)[0])
