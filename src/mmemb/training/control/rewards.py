"""Rewards of the control phase: small classes, weighted in YAML, each logged under its name.

To add your own reward, write a subclass. Give it a short name, or use it by its class path:

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
    """The results of R rollouts of N queries: everything that a reward can use, on the CPU.

    Attributes:
        pairs: the N queries with their targets.
        query: [R] int64, the query that each rollout belongs to.
        think: [R] bool, whether the rollout reasons.
        tokens: [R] int64, rationale tokens with ``<think>`` and ``</think>``; 0 if the rollout does not reason.
        truncated: [R] bool, whether the budget ended the rationale.
        rationale: R texts, empty if the rollout does not reason.
        log_probability: [R], log-probability of the positive among the task's candidates, by the rollout's
            embedding.
        rank: [R], rank of the positive among these candidates, from 1; a tie counts half.
        direct_log_probability: [R], the log-probability by the query's direct embedding.
        direct_rank: [R], the rank by the query's direct embedding.
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
        """Scores each rollout's embedding, and the direct embedding of its query: [R] and [R]."""
        if kind == "reciprocal_rank":
            return 1 / self.rank, 1 / self.direct_rank
        if kind == "probability":
            return self.log_probability.exp(), self.direct_log_probability.exp()
        return self.log_probability, self.direct_log_probability

    def mean_by_query(self, values: Tensor, rows: Tensor) -> Tensor:
        """Averages values [R] over each query's rollouts in ``rows`` [R] bool; [N], nan for a query without any."""
        total = values.new_zeros(len(self.pairs)).index_add(0, self.query[rows], values[rows])
        count = values.new_zeros(len(self.pairs)).index_add(0, self.query[rows], torch.ones_like(values[rows]))
        return total / count


class Reward(Component, ABC, kind="reward"):
    """Gives a number to each rollout.

    Args:
        weight: factor of this reward in the sum by which rollouts are compared.
    """

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(name=name, **kwargs)
        if name is None:  # the name in logs: the class name in lower case, with words joined by "_"
            cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, outcome: Outcome) -> Tensor:
        """The unweighted reward of every rollout, [R] float, finite."""


class Format(Reward, name="format"):
    """1 for a direct rollout or a rationale with words that the model closed itself, otherwise 0.

    Args:
        weight: see `Reward`.
    """

    def __call__(self, outcome: Outcome) -> Tensor:
        words = torch.tensor([bool(text.strip()) for text in outcome.rationale])
        return (~outcome.think | (words & ~outcome.truncated)).float()


class Retrieval(Reward, name="retrieval"):
    """How well the rollout's embedding finds the positive among the task's own candidates.

    Args:
        score: the positive's log-probability, its probability, or 1 divided by its rank.
        weight: see `Reward`.
    """

    def __init__(self, score: Score = "probability", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.score: Score = score

    def __call__(self, outcome: Outcome) -> Tensor:
        return outcome.scores(self.score)[0]


class Utility(Reward, name="utility"):
    """What reasoning gains: s_r - s_d minus a price per token. For a direct rollout, what skipping reasoning gains.

    The utility s_r - s_d comes from the paper MMEmb-R1 (arXiv 2604.06156); the price is subtracted from it. A direct
    rollout gets minus the mean net utility of those rollouts of the same query that reason (0 if none does).

    Args:
        price: cost of a token, in units of the score.
        score: the score s: the positive's log-probability, its probability, or 1 divided by its rank.
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
    """0 up to a soft limit, then falling to -1 at a hard limit (the soft punishment of DAPO, arXiv 2503.14476).

    Args:
        soft: number of rationale tokens, including ``<think>`` and ``</think>``, that cost nothing.
        hard: number of rationale tokens at and above which the reward is -1.
        weight: see `Reward`.

    Raises:
        ValueError: 0 <= soft < hard does not hold.
    """

    def __init__(self, soft: int = 32, hard: int = 50, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_numbers("OverLength", at_least=0, soft=soft)
        check_numbers("OverLength", above=soft, hard=hard)
        self.soft = soft
        self.hard = hard

    def __call__(self, outcome: Outcome) -> Tensor:
        return -((outcome.tokens - self.soft) / (self.hard - self.soft)).clamp(0, 1).float()
