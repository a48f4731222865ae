"""What the passes with gradients of a control step have to do.

Legend: N queries, G rollouts of each, R = N G rollouts, r of them that thought.
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
    """What a step's passes with gradients are to do: fixed when the rollouts are scored."""

    rollouts: Rollouts
    policy: Policy
    thinking: Tensor  # [r] rows of the rollouts that thought
    decision_advantage: Tensor  # [R]
    rationale_advantage: Tensor  # [r]
    importance: Tensor  # [R]
    contrast: CachedLoss
    references: list[Tensor] | None  # [r of a chunk, L] each

    def spans(self, batch: ControlBatch) -> list[tuple[slice, Tensor, Tensor]]:
        """Of each chunk: its queries, its rollouts that thought, and the chunk's query each of those belongs to."""
        spans, start = [], 0
        owner = self.thinking // self.rollouts.group_size
        for prompt, _ in batch.chunks:
            stop = start + len(prompt)
            rows = self.thinking[(owner >= start) & (owner < stop)]
            spans.append((slice(start, stop), rows, rows // self.rollouts.group_size - start))
            start = stop
        return spans
