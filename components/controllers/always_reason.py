"""The controller with which every query reasons."""

from __future__ import annotations

import torch

from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class AlwaysReason(Controller, name="always_reason"):
    """Reasons about every query before embedding it.

    Args:
        budget: maximum number of rationale tokens per query; null for the encoder's own budget.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Every query reasons."""
        rows = len(state.direct)
        device = state.direct.device
        return Decision(
            think=torch.ones(rows, dtype=torch.bool, device=device),
            probability=torch.ones(rows, device=device),
            budget=torch.full((rows,), self.limit, device=device),
        )
