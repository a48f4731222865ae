"""The controller that decides at random: the baseline for every other controller."""

from __future__ import annotations

import torch

from mmemb.common.checks import check_numbers
from mmemb.common.digests import coin
from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState

_SIGNS = 256
"""Coordinates that identify a query: enough that two queries rarely have the same signs."""


class Random(Controller, name="random"):
    """Reasons about a query with a fixed probability: the baseline of every other controller.

    The random number is a hash of the seed and of the signs of the direct embedding. So the decision does not depend on
    the other queries of the batch or on the order, and rarely on rounding. Queries with equal embeddings get the same
    decision.

    Args:
        rate: probability of reasoning, in [0, 1].
        seed: seed of the random numbers.
        budget: maximum number of rationale tokens per query; null for the encoder's own budget.
    """

    def __init__(self, rate: float = 0.5, seed: int = 0, budget: int | None = None) -> None:
        check_numbers("controllers.random", at_least=0, at_most=1, rate=rate)
        check_numbers("controllers.random", at_least=1, budget=budget)
        self.rate = rate
        self.seed = seed
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Compares one random number per query with the rate."""
        signs = (state.direct[:, :_SIGNS] > 0).to(torch.uint8).cpu().numpy()
        drawn = torch.tensor([coin(self.seed, row.tobytes()) for row in signs], dtype=torch.float64)
        think = (drawn < self.rate).to(state.direct.device)
        return binary(think, torch.full_like(state.direct[:, 0], self.rate), budget=self.limit)
