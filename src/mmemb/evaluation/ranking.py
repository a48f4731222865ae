"""Ranks embedded queries among their candidates: hits, ranks and probabilities of their positives.

Shape legend: N queries, M candidates, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmemb.evaluation.metrics import cosine_scores, expected_hit, expected_rank
from mmemb.types import EvaluationTask

TOP = 3
_ROWS = 1024
"""Queries scored at once, which bounds the size of the score matrix."""


@dataclass(frozen=True)
class Ranking:
    """The candidates of a task, and the part of them among which each query is ranked.

    Attributes:
        candidates: [M, D], normalised.
        positive: [N] int64, row of each query's positive.
        outside: [N, M] bool, candidates that do not count for a query; None if all candidates count for every query.
    """

    candidates: Tensor
    positive: Tensor
    outside: Tensor | None = None

    @classmethod
    def of(cls, task: EvaluationTask, candidates: Tensor) -> Ranking:
        """The ranking of a task, given the embeddings [M, D] of its candidates.

        Raises:
            ValueError: the task has no queries, or a positive is not among the candidates.
        """
        columns = {identity: column for column, identity in enumerate(task.candidate_ids)}
        for pair in task.queries:
            if pair.positive_id not in columns:
                raise ValueError(
                    f"task {task.name}: the positive {pair.positive_id!r} of query {pair.id!r} is not a candidate"
                )
        if not task.queries:
            raise ValueError(f"task {task.name}: the task has no queries; add at least one, or remove the task")
        outside = None
        if any(pair.ranked_alone for pair in task.queries):
            outside = torch.zeros(len(task.queries), len(columns), dtype=torch.bool)
            for row, pair in enumerate(task.queries):
                if pair.ranked_alone:
                    outside[row] = True
                    outside[row, [columns[each] for each in (pair.positive_id, *pair.hard_negative_ids)]] = False
        return cls(candidates, torch.tensor([columns[pair.positive_id] for pair in task.queries]), outside)

    @property
    def counts(self) -> Tensor:
        """[N] int64, number of candidates among which each query is ranked."""
        every = torch.full_like(self.positive, len(self.candidates))
        return every if self.outside is None else every - self.outside.sum(1)

    def parts(self) -> tuple[Tensor, ...]:
        """The numbers of the queries, in parts of at most 1024."""
        return torch.arange(len(self.positive)).split(_ROWS)

    def scores(self, embedding: Tensor, rows: Tensor) -> Tensor:
        """Cosines [n, M] float64 of some of the queries' embeddings [N, D]; -inf for candidates that do not count."""
        scores = cosine_scores(embedding[rows], self.candidates)
        return scores if self.outside is None else scores.masked_fill(self.outside[rows], -torch.inf)

    def hits(self, embedding: Tensor) -> Tensor:
        """Expected hit@1 per query, [N] float64."""
        return torch.cat([expected_hit(self.scores(embedding, rows), self.positive[rows], 1) for rows in self.parts()])

    def placed(self, embedding: Tensor) -> list[tuple[float, float, tuple[int, ...]]]:
        """Expected rank, expected hit@1 and the columns of the first candidates of every query."""
        placed = []
        for rows in self.parts():
            scores, positive = self.scores(embedding, rows), self.positive[rows]
            best = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).topk(min(TOP, scores.shape[1]), dim=1)
            ranks, hits = expected_rank(scores, positive).tolist(), expected_hit(scores, positive, 1).tolist()
            for rank, hit, columns, found in zip(ranks, hits, best.indices.tolist(), best.values.tolist(), strict=True):
                own = tuple(column for column, score in zip(columns, found, strict=True) if score > -torch.inf)
                placed.append((rank, hit, own))
        return placed

    def log_probability(self, embedding: Tensor, *, temperature: float) -> Tensor:
        """Log-probability of the positive per query, [N]."""
        return self._logits(embedding, temperature).log_softmax(dim=-1).gather(1, self.positive[:, None])[:, 0]

    def confidence(self, embedding: Tensor, *, temperature: float) -> Tensor:
        """Largest softmax probability per query, [N] in [0, 1]."""
        return self._logits(embedding, temperature).softmax(dim=-1).amax(dim=-1)

    def _logits(self, embedding: Tensor, temperature: float) -> Tensor:
        logits = embedding @ self.candidates.T / temperature
        return logits if self.outside is None else logits.masked_fill(self.outside, -torch.inf)
