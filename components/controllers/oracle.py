"""The upper bound: think exactly where it pays."""

from __future__ import annotations

from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Oracle(Controller, name="oracle"):
    """Reasons exactly where the known utility exceeds the price: an upper bound, for evaluation only.

    Source: reasoning should be invoked only where delta = s_r - s_d > 0 (MMEmb-R1, arXiv 2604.06156), net of its cost.

    Args:
        price: least utility worth thinking for, in units of the utility.
        budget: most rationale tokens of a row.
    """

    needs_utility = True

    def __init__(self, price: float = 0.0, budget: int = 48) -> None:
        self.price = price
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Compares utility and price.

        Raises:
            ValueError: the utility is unknown, as it always is outside evaluation.
        """
        if state.utility is None:
            raise ValueError(
                "controller oracle: the utility is unknown here; it works in evaluation only, choose another"
            )
        think = state.utility > self.price
        return binary(think, think.float(), budget=self.budget)
