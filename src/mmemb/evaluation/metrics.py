"""Retrieval metrics that treat ties fairly.

A model that gives every candidate the same score ranks nothing. If its positive counted as first (or last), the metric
would measure an implementation detail of sorting. So every metric here is the expected value over a random order of the
candidates that tie with the positive, and a collapsed model scores exactly chance. Let a candidates be strictly above
the positive, and let t candidates tie with it, itself included. Then the rank of the positive is uniform on
a+1 ... a+t, and the expected value of any gain g(rank) is the mean of g over that range.

Non-finite scores count as the worst case. A positive with a non-finite score is ranked last, without a tie. Any other
candidate with the score nan or +inf ranks above the positive. A candidate masked with -inf ranks below it.

Shape legend: N queries, M candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmemb.common.checks import check_numbers

_DECIMALS = 6
"""Decimals to which cosines are compared: float32 products differ by about 1e-7 with the tile of the column."""


def cosine_scores(query: Tensor, candidate: Tensor) -> Tensor:
    """Cosines [N, M] float64 of normalised embeddings [N, D] and [M, D], rounded so that equal candidates tie."""
    return (query.double() @ candidate.double().T).round(decimals=_DECIMALS)


def placement(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the candidates above each positive, and those tied with it.

    Args:
        scores: [N, M] float, higher is better.
        positive: [N] int64, column of each query's positive.

    Returns:
        [N] int64, number of candidates strictly above the positive, and [N] int64, number of candidates tied with it,
        itself included.

    Raises:
        ValueError: the shapes do not fit, or a positive is not a column of the scores.
    """
    if scores.ndim != 2 or positive.shape != scores.shape[:1]:
        raise ValueError(
            f"metrics: scores {tuple(scores.shape)} and positive {tuple(positive.shape)} given; expected [N, M] and [N]"
        )
    if len(positive) and (int(positive.min()) < 0 or int(positive.max()) >= scores.shape[1]):
        raise ValueError(f"metrics: a positive is outside the {scores.shape[1]} candidates; give columns of `scores`")
    own = scores.gather(1, positive[:, None])
    above = (scores > own) | scores.isnan() | scores.isposinf()
    tied = (scores == own) & ~above
    above_count, tie_count = above.sum(dim=1), tied.sum(dim=1)
    lost = ~own[:, 0].isfinite()
    last = torch.full_like(above_count, scores.shape[1] - 1)
    return torch.where(lost, last, above_count), torch.where(lost, 1, tie_count)


def expected_hit(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    """Expected hit@k, [N] float64 in [0, 1]: the share of tie orders that put the positive among the first k.

    Args:
        scores: [N, M] float, higher is better.
        positive: [N] int64, column of each query's positive.
        k: length of the list, from 1.
    """
    above, tied = placement(scores, positive)
    return ((k - above).double() / tied).clamp(0, 1)


def expected_reciprocal_rank(scores: Tensor, positive: Tensor) -> Tensor:
    """Expected 1 / rank, [N] float64 in (0, 1]; arguments as in `expected_hit`."""
    return _expected_gain(scores, positive, lambda rank: 1 / rank)


def expected_rank(scores: Tensor, positive: Tensor) -> Tensor:
    """Expected rank, [N] float64, from 1; arguments as in `expected_hit`."""
    return _expected_gain(scores, positive, lambda rank: rank)


def _expected_gain(scores: Tensor, positive: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of gain(rank) over the ranks a + 1 ... a + t, from the running sum of the gains of all M ranks."""
    above, tied = placement(scores, positive)
    ranks = torch.arange(1, scores.shape[1] + 1, dtype=torch.float64, device=scores.device)
    total = torch.cat([ranks.new_zeros(1), gain(ranks).cumsum(0)])
    return (total[above + tied] - total[above]) / tied


class _Mean(Metric):
    """A mean over queries, with sums that are added over ranks."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, positive: Tensor) -> None:
        """Adds N queries, with scores [N, M] and positive [N] int64."""
        self.total += self.values(scores, positive).sum()
        self.count += len(positive)

    def compute(self) -> Tensor:
        """The mean over the queries of all ranks."""
        return self.total / self.count

    def values(self, scores: Tensor, positive: Tensor) -> Tensor:
        raise NotImplementedError


class ExpectedHitRate(_Mean):
    """Mean expected hit@k.

    Args:
        k: length of the list, from 1.
        **kwargs: as in `torchmetrics.Metric`.
    """

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("ExpectedHitRate", at_least=1, k=k)
        self.k = k

    def values(self, scores: Tensor, positive: Tensor) -> Tensor:
        """Expected hit@k per query, [N]."""
        return expected_hit(scores, positive, self.k)


class ExpectedReciprocalRank(_Mean):
    """Mean expected reciprocal rank (MRR)."""

    def values(self, scores: Tensor, positive: Tensor) -> Tensor:
        """Expected reciprocal rank per query, [N]."""
        return expected_reciprocal_rank(scores, positive)
