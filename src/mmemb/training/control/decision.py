"""The decision whether to reason, as the control phase learns it, on a standardised scale."""

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
"""Number of queries per task that the policy is standardised on."""


@dataclass(frozen=True)
class Policy:
    """The learned decision: the model reasons with probability sigmoid((l_think - l_emb - center) / spread).

    Attributes:
        center: difference of the decision logits at which both decisions are equally likely.
        spread: unit of the difference.
    """

    center: float = 0.0
    spread: float = 1.0

    def log_prob(self, logits: Tensor) -> Tensor:
        """Log-probabilities [n, 2] of reasoning and of not reasoning, from the logits [n, 2] of the two tokens."""
        margin = (logits[:, 0] - logits[:, 1] - self.center) / self.spread
        return torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=1)


def sample(tasks: Sequence[EvaluationTask]) -> list[Item]:
    """Picks evenly spaced queries of every task, because neighbours in a data set are often alike."""
    return [
        task.queries[row * len(task.queries) // count].query
        for task in tasks
        for count in [min(_SAMPLE, len(task.queries))]
        for row in range(count)
    ]


def standardised(encoder: Encoder, queries: Sequence[Item]) -> Policy:
    """Returns the policy under which the queries are undecided on average and no task is decided in advance."""
    if not queries:
        return Policy()
    margin = encoder.encode_paths(queries, create("controller", "never")).state.margin
    return Policy(float(margin.median()), max(float(margin.std(correction=0)), 1.0))
