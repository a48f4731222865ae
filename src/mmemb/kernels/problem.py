"""The input and the output of an InfoNCE engine, and the loss as a formula.

    N queries   M candidates   L peers   D width
    Q [N, D]    K [M, D]       dot = Q K^T, c = 1 / temperature, b = hardness
    p_i = c dot[i, positive(i)]   the positive's logit
    z   = (c + b) dot             the logits of negatives: exp(b dot) weighs exp(c dot), and the weight is a constant

    x_i  = sum over other peers l of exp((c + b) q_i . peer_l)             with ``peers``
         + sum over j != positive(i) of exp((c + b) k_positive(i) . k_j)   with ``candidate_negatives``
    o_i  = log(sum over j != positive(i) of exp(z_ij) + x_i)
    o'_i = log(sum over rows r != i of exp(z[r, positive(i)]) + x_i)
    loss_i = log(1 + exp(o_i - p_i)); the symmetric loss is half the sum of that and log(1 + exp(o'_i - p_i))

Every sum leaves out negatives with the id of query i (in o'_i: rows r whose query has the candidate's id). It also
leaves out negatives whose dot product exceeds dot[i, positive(i)] + margin by more than rounding (`Problem.limits`).

Gradients treat exp(b dot) as a constant: d loss_i / d (c dot_ij) = exp(z_ij) / (exp(o_i) + exp(p_i)) at a negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Merge: TypeAlias = Callable[["Columns"], "Columns"]
"""Joins the columns with those of other ranks' queries. An engine may call it more than once per problem."""

WORKSPACE_BYTES = 256 * 2**20
"""Default maximum size of an engine's N x M buffers, in bytes."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The queries that are negatives of other queries.

    Attributes:
        query: [L, D], the problem's own queries or those of all ranks.
        own: [N] int64, for each of the problem's queries its own row of ``query``.
        id: [L] int64; None exactly if the problem has no ids.
    """

    query: Tensor
    own: Tensor
    id: Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """The checked input of the engines, made by `mmemb.kernels.prepare.prepare`.

    Attributes:
        query: [N, D].
        candidate: [M, D], same dtype.
        scale: c = 1 / temperature, 0-d in `work_dtype`.
        positive: [N] int64, rows of ``candidate``; distinct for the symmetric loss.
        query_id: [N] int64 or None. Negatives with the id of a query are left out.
        candidate_id: [M] int64; None exactly if ``query_id`` is None.
        bound: upper bound of the absolute value of all logits, further negatives included.
        margin: negatives whose dot product exceeds the positive's by more than this are left out; None keeps all.
        peers: queries that are negatives too, or None.
        candidate_negatives: the other candidates are negatives of each query's positive too.
        hardness: b >= 0.
        dims: None, or ascending widths d. The loss is then the sum of the losses on the first d columns, each row
            normalised to length 1. For an engine without ``dims``, `mmemb.kernels.engines.solve` makes one problem per
            width.
    """

    query: Tensor
    candidate: Tensor
    scale: Tensor
    positive: Tensor
    query_id: Tensor | None
    candidate_id: Tensor | None
    bound: float
    margin: float | None = None
    peers: Peers | None = None
    candidate_negatives: bool = False
    hardness: float = 0.0
    dims: tuple[int, ...] | None = None

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return work_dtype(self.query.dtype)

    @property
    def negative_scale(self) -> Tensor:
        """c + b, 0-d: the factor of the negatives' dot products."""
        return self.scale + self.hardness

    def limits(self, own: Tensor) -> Tensor | None:
        """Returns the logits above which a query's negatives are left out; None without a margin.

        A copy of the positive is kept at margin 0, although its logit comes from a sum in another order.

        Args:
            own: [..., N] the positives' logits p. The limits have its shape.
        """
        if self.margin is None:
            return None
        # In units of eps times the pair's lengths, which a copy shares. On a CPU two orders of a sum differed by 5.5 at
        # most (D = 32 to 4096). Tensor cores truncate a sum once in 16 terms.
        slack = max(8.0, self.query.shape[1] / 16) * torch.finfo(self.work_dtype).eps * self._pair_lengths()
        return (own / self.scale + self.margin + slack) * self.negative_scale

    def _pair_lengths(self) -> Tensor | float:
        """[N] length of every query times the length of its positive; 1 with ``dims``, which normalise."""
        if self.dims is not None:
            return 1.0
        query, candidate = (
            torch.linalg.vector_norm(rows, dim=1, dtype=self.work_dtype) for rows in (self.query, self.candidate)
        )
        return query * candidate[self.positive]


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of sum(coefficient * loss), in the work dtype: they may still be added and multiplied.

    Attributes:
        query: [N, D], for the queries as rows of the problem, without their part as peers.
        candidate: [M, D].
        temperature: 0-d.
        peers: [L, D] if the problem has peers. The caller adds it to the gradients of the same queries.
    """

    query: Tensor
    candidate: Tensor
    temperature: Tensor
    peers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """The values of the symmetric loss per candidate, a column of S = c dot.

    Attributes:
        others: [M] o' of the column's own query, whose positive the column is. Without such a query, the log-sum-exp of
            the column's logits.
        own: [M] logit p of that query; 0 if there is none.
        share: [M] half the coefficient of that query's loss; 0 if there is none.
    """

    others: Tensor
    own: Tensor
    share: Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, and otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
