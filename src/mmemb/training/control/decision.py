"""The decision as the control phase learns it: whether to think, in a unit of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmemb.inference.encoder import Encoder
from mmemb.registry import create
from mmemb.types import EvaluationTask, Item

_SAMPLE = 16
"""Queries of a task from which the policy is standardised."""


@dataclass(frozen=True)
class Policy:
    """The decision as it is learned: thinking has probability sigmoid((l_think - l_emb - center) / spread).

    Attributes:
        center: difference of the decision logits at which both decisions are as likely.
        spread: its unit.
    """

    center: float = 0.0
    spread: float = 1.0

    def log_prob(self, logits: Tensor) -> Tensor:
        """Log-probabilities [n, 2] of thinking and not, from the two tokens' logits [n, 2]."""
        margin = (logits[:, 0] - logits[:, 1] - self.center) / self.spread
        return torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=1)


def sample(tasks: Sequence[EvaluationTask]) -> list[Item]:
    """Some queries of every task, evenly spaced: neighbours in a data set are often alike."""
    return [
        task.queries[row * len(task.queries) // count].query
        for task in tasks
        for count in [min(_SAMPLE, len(task.queries))]
        for row in range(count)
    ]


def standardised(encoder: Encoder, queries: Sequence[Item]) -> Policy:
    """The policy under which the queries are undecided on average and no task is settled beforehand."""
    if not queries:
        return Policy()
    margin = encoder.encode_paths(queries, create("controller", "never")).state.margin
    return Policy(float(margin.median()), max(float(margin.std(correction=0)), 1.0))
