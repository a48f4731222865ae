"""The baseline a controller must beat: a coin with the same think rate."""

from __future__ import annotations

import torch

from mmemb.common.checks import check_numbers
from mmemb.common.digests import coin
from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState

_SIGNS = 256
"""Coordinates that identify a row: enough that two queries rarely agree in all signs."""


class Random(Controller, name="random"):
    """Reasons about a query with a fixed probability: the line a controller must beat.

    The coin is a hash of the seed and the signs of the row's direct embedding, so that a row's decision depends neither
    on its neighbours nor on its place (and hardly on rounding). Rows with the same embedding share their coin.

    Args:
        rate: probability of thinking, in [0, 1].
        seed: of the coins.
        budget: most rationale tokens of a row; null: as many as the encoder allows.
    """

    def __init__(self, rate: float = 0.5, seed: int = 0, budget: int | None = None) -> None:
        check_numbers("controllers.random", at_least=0, at_most=1, rate=rate)
        check_numbers("controllers.random", at_least=1, budget=budget)
        self.rate = rate
        self.seed = seed
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Tosses one coin a row."""
        signs = (state.direct[:, :_SIGNS] > 0).to(torch.uint8).cpu().numpy()
        coins = torch.tensor([coin(self.seed, row.tobytes()) for row in signs], dtype=torch.float64)
        think = (coins < self.rate).to(state.direct.device)
        return binary(think, torch.full_like(state.direct[:, 0], self.rate), budget=self.limit)
