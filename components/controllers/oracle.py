"""The upper bound: think exactly where it pays."""

from __future__ import annotations

from typing import Literal

from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Oracle(Controller, name="oracle"):
    """Reasons exactly where what it brings is known to exceed the price: an upper bound, for evaluation only.

    Source: reasoning should be invoked only where delta = s_r - s_d > 0 (MMEmb-R1, arXiv 2604.06156), net of its cost.

    Args:
        gain: what counts: ``hit`` is what thinking adds to hit@1, ``utility`` to the positive's log-probability.
        price: least gain worth thinking for, in its units.
        budget: most rationale tokens of a row; null: as many as the encoder allows.
    """

    needs_utility = True

    def __init__(self, gain: Literal["hit", "utility"] = "hit", price: float = 0.0, budget: int | None = None) -> None:
        self.gain = gain
        self.price = price
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Compares gain and price.

        Raises:
            ValueError: the gain is unknown, as it always is outside evaluation.
        """
        gain = state.hit_gain if self.gain == "hit" else state.utility
        if gain is None:
            raise ValueError(
                "controller oracle: the utility is unknown here; it works in evaluation only, choose another"
            )
        think = gain > self.price
        return binary(think, think.float(), budget=self.limit)
