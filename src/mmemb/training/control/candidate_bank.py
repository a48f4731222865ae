"""The candidates that rollouts are scored against: the task's own, embedded by the model as it lately was.

Measured before (see `docs/control.md`): against a batch of mixed tasks a rationale seems to be worth nothing, since the
negatives are too easy; against the task's own candidates the utility shows.

Legend: N queries, R rollouts, M candidates of a task, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmemb.common.digests import seed_of
from mmemb.evaluation.ranks import sharded
from mmemb.inference.encoder import Encoder
from mmemb.types import EvaluationTask, Item, Pair


class CandidateBank:
    """Up to so many candidates a task; a query's own positive always competes, whether it is among them or not.

    Args:
        tasks: the tasks with all their candidates.
        size: most candidates a task; which ones is drawn by the seed and does not depend on their order.
        seed: of the draw.

    Raises:
        ValueError: there is no task.
    """

    def __init__(self, tasks: Sequence[EvaluationTask], *, size: int, seed: int = 0) -> None:
        if not tasks:
            raise ValueError("control: there are no tasks whose candidates rollouts could be scored against")
        self._items: dict[str, dict[str, Item]] = {}
        self._embedded: dict[str, Tensor] = {}
        for task in tasks:
            every = dict(zip(task.candidate_ids, task.candidates, strict=True))
            order = sorted(every, key=lambda identity: (seed_of(seed, task.name, identity), identity))
            self._items[task.name] = {identity: every[identity] for identity in order[:size]}

    @property
    def ready(self) -> bool:
        """Whether the candidates have been embedded."""
        return bool(self._embedded)

    def refresh(self, encoder: Encoder) -> None:
        """Embeds every candidate with the model as it is; ranks share the work."""
        items = [item for task in self._items.values() for item in task.values()]
        embedded = sharded(items, encoder.encode_targets).split([len(task) for task in self._items.values()])
        self._embedded = dict(zip(self._items, embedded, strict=True))

    def score(
        self, pairs: Sequence[Pair], positive: Tensor, embedding: Tensor, query: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probability [R] of each positive among its task's candidates, and its rank [R] (a tie counts half).

        Args:
            pairs: N queries.
            positive: [N, D], their targets as the model embeds them now.
            embedding: [R, D].
            query: [R] int64, the query of each row.
            temperature: divides the cosines.

        Raises:
            ValueError: a pair's task has no candidates here.
        """
        log_probability, rank = embedding.new_zeros(len(query)), embedding.new_zeros(len(query))
        for task in sorted({pair.task for pair in pairs}):
            if task not in self._embedded:
                known = ", ".join(sorted(self._items))
                raise ValueError(f"control: no candidates for the task {task!r}, only for: {known}")
            own = torch.tensor([pair.task == task for pair in pairs])
            rows = own[query].nonzero().flatten()
            places = {identity: column for column, identity in enumerate(self._items[task])}
            column = torch.tensor([places.get(pair.positive_id, -1) for pair in pairs])[query[rows]]
            cosine = embedding[rows] @ self._embedded[task].T  # [r, M]
            inside = (column >= 0).nonzero().flatten()
            cosine[inside, column[inside]] = -torch.inf  # the positive is no negative
            true = (embedding[rows] * positive[query[rows]]).sum(1, keepdim=True)
            log_probability[rows] = (torch.cat([true, cosine], 1) / temperature).log_softmax(1)[:, 0]
            rank[rows] = 1 + (cosine > true).sum(1) + 0.5 * (cosine == true).sum(1)
        return log_probability, rank

    def state(self) -> dict[str, Any]:
        """The embeddings at hand, for a checkpoint."""
        return {"embedded": dict(self._embedded)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up embeddings of `state`.

        Raises:
            ValueError: they are of other candidates.
        """
        found = {task: len(value) for task, value in state["embedded"].items()}
        if found and found != (wanted := {task: len(items) for task, items in self._items.items()}):
            raise ValueError(
                f"control: the checkpoint's candidates are {found}, this run's {wanted}; resume with the settings and "
                "the data that it was trained with"
            )
        self._embedded = dict(state["embedded"])
