"""The upper bound of every controller: it reasons exactly where reasoning pays."""

from __future__ import annotations

from typing import Literal

from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Oracle(Controller, name="oracle"):
    """Reasons exactly where its known gain exceeds a price: an upper bound, for evaluation only.

    Source: MMEmb-R1 (arXiv 2604.06156) invokes reasoning only where delta = s_r - s_d, minus its cost, is above 0.

    Args:
        gain: ``hit`` for the gain of hit@1, ``utility`` for the gain of the positive's log-probability.
        price: gain above which a query reasons, in the unit of ``gain``.
        budget: maximum number of rationale tokens per query; null for the encoder's own budget.
    """

    needs_utility = True

    def __init__(self, gain: Literal["hit", "utility"] = "hit", price: float = 0.0, budget: int | None = None) -> None:
        self.gain = gain
        self.price = price
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Compares the gain with the price.

        Raises:
            ValueError: the gain is unknown, which is always so outside evaluation.
        """
        gain = state.hit_gain if self.gain == "hit" else state.utility
        if gain is None:
            raise ValueError(
                "controller oracle: the gain from reasoning is known in evaluation only; use another controller here"
            )
        think = gain > self.price
        return binary(think, think.float(), budget=self.limit)
