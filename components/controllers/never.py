"""The controller with which no query reasons."""

from __future__ import annotations

import torch

from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Never(Controller, name="never"):
    """Embeds every query directly, without reasoning."""

    def decide(self, state: PrefillState) -> Decision:
        """No query reasons."""
        rows = len(state.direct)
        device = state.direct.device
        return Decision(
            think=torch.zeros(rows, dtype=torch.bool, device=device),
            probability=torch.zeros(rows, device=device),
            budget=torch.zeros(rows, dtype=torch.int64, device=device),
        )
