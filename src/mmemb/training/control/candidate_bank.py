"""The candidates that rollouts are scored against: those of the task, embedded by a recent state of the model.

The measurement behind this choice is in `docs/control.md`. Against a batch of mixed tasks a rationale seems worthless,
because the negatives are too easy. Against the task's own candidates its utility shows.

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
    """Holds up to ``size`` candidates per task. A query's positive always competes, even if it is not among them.

    Args:
        tasks: the tasks with all their candidates.
        size: maximum number of candidates per task. The seed decides which; their order does not matter.
        seed: seed of this draw.

    Raises:
        ValueError: there is no task.
    """

    def __init__(self, tasks: Sequence[EvaluationTask], *, size: int, seed: int = 0) -> None:
        if not tasks:
            raise ValueError("control: there are no tasks, so rollouts have no candidates to be scored against")
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
        """Embeds every candidate with the current model. The ranks share the work."""
        items = [item for task in self._items.values() for item in task.values()]
        embedded = sharded(items, encoder.encode_targets).split([len(task) for task in self._items.values()])
        self._embedded = dict(zip(self._items, embedded, strict=True))

    def score(
        self, pairs: Sequence[Pair], positive: Tensor, embedding: Tensor, query: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-probability [R] of each positive among its task's candidates, and its rank [R].

        A tie counts half in the rank.

        Args:
            pairs: N queries.
            positive: [N, D], the current embeddings of their targets.
            embedding: [R, D].
            query: [R] int64, the query of each row.
            temperature: divides the cosines.

        Raises:
            ValueError: a pair's task has no candidates in this bank.
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
            cosine[inside, column[inside]] = -torch.inf  # the positive is not its own negative
            true = (embedding[rows] * positive[query[rows]]).sum(1, keepdim=True)
            log_probability[rows] = (torch.cat([true, cosine], 1) / temperature).log_softmax(1)[:, 0]
            rank[rows] = 1 + (cosine > true).sum(1) + 0.5 * (cosine == true).sum(1)
        return log_probability, rank

    def state(self) -> dict[str, Any]:
        """Returns the current embeddings for a checkpoint."""
        return {"embedded": dict(self._embedded)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the embeddings of a `state`.

        Raises:
            ValueError: the embeddings are of other candidates.
        """
        found = {task: len(value) for task, value in state["embedded"].items()}
        if found and found != (wanted := {task: len(items) for task, items in self._items.items()}):
            raise ValueError(
                f"control: the checkpoint's candidates are {found}, but this run's are {wanted}; resume with the "
                "settings and the data that the checkpoint was trained with"
            )
        self._embedded = dict(state["embedded"])
