"""The learned decision: the model itself writes ``<think>`` or ``<emb>`` after the prompt."""

from __future__ import annotations

from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Rl(Controller, name="rl"):
    """Follows the model's own decision token, trained jointly and by reinforcement learning.

    MMEmb-R1 (arXiv 2604.06156) lets the model choose and learns the choice by GRPO; at inference we take the likelier
    of the two tokens, p = softmax([l_think + offset, l_emb])[0] > 0.5. The offset is the price dial: lower thinks less.

    Args:
        offset: added to the logit of ``<think>``, in nats.
        budget: most rationale tokens of a row.
    """

    def __init__(self, offset: float = 0.0, budget: int = 48) -> None:
        self.offset = offset
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Thinks where the model says ``<think>``."""
        logits = state.decision_logits.float()
        probability = (logits[:, 0] - logits[:, 1] + self.offset).sigmoid()
        return binary(probability > 0.5, probability, budget=self.budget)
