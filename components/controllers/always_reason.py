"""The other end of the dial: everybody thinks."""

from __future__ import annotations

import torch

from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class AlwaysReason(Controller, name="always_reason"):
    """Reasons about every query before embedding it.

    Args:
        budget: most rationale tokens of a row; null: as many as the encoder allows.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """B times yes."""
        rows = len(state.direct)
        device = state.direct.device
        return Decision(
            think=torch.ones(rows, dtype=torch.bool, device=device),
            probability=torch.ones(rows, device=device),
            budget=torch.full((rows,), self.limit, device=device),
        )
