"""What a rollout is worth in the control phase: small classes, weighted in YAML, each logged under its name.

A reward of your own is a subclass. Give it a short name, or use it by its class path:

    class Brief(Reward, name="brief"):
        def __call__(self, outcome: Outcome) -> Tensor:
            return -outcome.tokens.float()

Legend: N queries, R rollouts.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.registry import Component
from mmemb.types import Pair

Score = Literal["log_probability", "probability", "reciprocal_rank"]


@dataclass(frozen=True)
class Outcome:
    """What R rollouts of N queries came to: all that a reward may look at, on the CPU.

    Attributes:
        pairs: the N queries with their targets.
        query: [R] int64, the query each rollout belongs to.
        think: [R] bool, the decision.
        tokens: [R] int64, rationale tokens, brackets included; 0 where the rollout did not think.
        truncated: [R] bool, the budget ended the rationale.
        rationale: R texts, empty where the rollout did not think.
        log_probability: [R], of the positive among the task's own candidates, under the rollout's embedding.
        rank: [R], of the positive there, from 1; a tie counts half.
        direct_log_probability: [R], the same under the query's direct embedding.
        direct_rank: [R], the same under the query's direct embedding.
    """

    pairs: Sequence[Pair]
    query: Tensor
    think: Tensor
    tokens: Tensor
    truncated: Tensor
    rationale: Sequence[str]
    log_probability: Tensor
    rank: Tensor
    direct_log_probability: Tensor
    direct_rank: Tensor

    def scores(self, kind: Score) -> tuple[Tensor, Tensor]:
        """How good each rollout's embedding is, and the direct embedding of its query: [R] and [R]."""
        if kind == "reciprocal_rank":
            return 1 / self.rank, 1 / self.direct_rank
        if kind == "probability":
            return self.log_probability.exp(), self.direct_log_probability.exp()
        return self.log_probability, self.direct_log_probability

    def mean_by_query(self, values: Tensor, rows: Tensor) -> Tensor:
        """Mean [N] of values [R] over a query's rollouts among ``rows`` [R] bool; nan where it has none."""
        total = values.new_zeros(len(self.pairs)).index_add(0, self.query[rows], values[rows])
        count = values.new_zeros(len(self.pairs)).index_add(0, self.query[rows], torch.ones_like(values[rows]))
        return total / count


class Reward(Component, ABC, kind="reward"):
    """A number a rollout.

    Args:
        weight: factor of this reward in the sum that rollouts are compared by.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(name=name, **kwargs)
        if name is None:  # what the reward is logged as: the class's name in lower case, words apart
            cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, outcome: Outcome) -> Tensor:
        """The unweighted reward of every rollout, [R] float, finite."""


class Format(Reward, name="format"):
    """1 for a rationale that has words and that the model closed itself, 0 for another; 1 for a direct rollout.

    Args:
        weight: see `Reward`.
    """

    def __call__(self, outcome: Outcome) -> Tensor:
        words = torch.tensor([bool(text.strip()) for text in outcome.rationale])
        return (~outcome.think | (words & ~outcome.truncated)).float()


class Retrieval(Reward, name="retrieval"):
    """How well the rollout's embedding finds the positive among the task's own candidates.

    Args:
        score: the positive's log-probability, its probability, or one over its rank.
        weight: see `Reward`.
    """

    def __init__(self, score: Score = "probability", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.score: Score = score

    def __call__(self, outcome: Outcome) -> Tensor:
        return outcome.scores(self.score)[0]


class Utility(Reward, name="utility"):
    """What thinking was worth: s_r - s_d net of a price a token; for a direct rollout, what not thinking was worth.

    The utility delta = s_r - s_d is that of MMEmb-R1 (arXiv 2604.06156), net of its cost. Not thinking is worth minus
    the mean net utility of the rollouts of the same query that thought (0 where none did).

    Args:
        price: what a token costs, in units of the score.
        score: what s is: the positive's log-probability, its probability, or one over its rank.
        weight: see `Reward`.
    """

    def __init__(self, price: float = 0.002, score: Score = "probability", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.price = price
        self.score: Score = score

    def __call__(self, outcome: Outcome) -> Tensor:
        reasoned, direct = outcome.scores(self.score)
        net = reasoned - direct - self.price * outcome.tokens
        counterpart = -outcome.mean_by_query(net, outcome.think).nan_to_num(nan=0.0)
        return torch.where(outcome.think, net, counterpart[outcome.query])


class OverLength(Reward, name="over_length"):
    """0 up to a soft limit, then falling to -1 at a hard one (the soft punishment of DAPO, arXiv 2503.14476).

    Args:
        soft: rationale tokens, brackets included, that cost nothing.
        hard: rationale tokens at which the whole reward is lost.
        weight: see `Reward`.

    Raises:
        ValueError: not 0 <= soft < hard.
    """

    def __init__(self, soft: int = 32, hard: int = 50, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_numbers("OverLength", at_least=0, soft=soft)
        check_numbers("OverLength", above=soft, hard=hard)
        self.soft = soft
        self.hard = hard

    def __call__(self, outcome: Outcome) -> Tensor:
        return -((outcome.tokens - self.soft) / (self.hard - self.soft)).clamp(0, 1).float()
