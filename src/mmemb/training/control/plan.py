"""The inputs of a control step's passes with gradients.

Legend: N queries, G rollouts per query, R = N G rollouts, of which r reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmemb.inference.rollout import Rollouts
from mmemb.losses.gradcache import CachedLoss
from mmemb.training.control.batch import ControlBatch
from mmemb.training.control.decision import Policy


@dataclass
class Plan:
    """The inputs of a step's passes with gradients, fixed once the rollouts are scored."""

    rollouts: Rollouts
    policy: Policy
    thinking: Tensor  # [r] rows of the rollouts that reason
    decision_advantage: Tensor  # [R]
    rationale_advantage: Tensor  # [r]
    importance: Tensor  # [R]
    contrast: CachedLoss
    references: list[Tensor] | None  # per chunk, [r of the chunk, L]

    def spans(self, batch: ControlBatch) -> list[tuple[slice, Tensor, Tensor]]:
        """For each chunk: its queries, its rollouts that reason, and the chunk's query of each such rollout."""
        spans, start = [], 0
        owner = self.thinking // self.rollouts.group_size
        for prompt, _ in batch.chunks:
            stop = start + len(prompt)
            rows = self.thinking[(owner >= start) & (owner < stop)]
            spans.append((slice(start, stop), rows, rows // self.rollouts.group_size - start))
            start = stop
        return spans
