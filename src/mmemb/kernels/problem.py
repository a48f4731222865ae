"""What an InfoNCE engine is given and what it returns.

    N queries   M candidates   L peers   D width
    Q [N, D]    K [M, D]       dot = Q K^T, c = 1 / temperature, b = hardness
    p_i = c dot[i, positive(i)]   the positive's logit
    z   = (c + b) dot             the logits of negatives: exp(b dot) weighs exp(c dot), and the weight is a constant

    x_i  = sum over other peers l of exp((c + b) q_i . peer_l)             with ``peers``
         + sum over j != positive(i) of exp((c + b) k_positive(i) . k_j)   with ``candidate_negatives``
    o_i  = log(sum over j != positive(i) of exp(z_ij) + x_i)
    o'_i = log(sum over rows r != i of exp(z[r, positive(i)]) + x_i)
    loss_i = log(1 + exp(o_i - p_i)); the symmetric loss is half the sum of that and log(1 + exp(o'_i - p_i))

    left out of every sum: what has the id of query i (of row r in o'_i: query r's id against the candidate's), and what
    has a dot product above dot[i, positive(i)] + margin, by more than rounding (`Problem.limits`)

Gradients treat exp(b dot) as a constant: d loss_i / d (c dot_ij) = exp(z_ij) / (exp(o_i) + exp(p_i)) at a negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Merge: TypeAlias = Callable[["Columns"], "Columns"]
"""Joins the columns with those of further queries elsewhere. An engine may call it more than once a problem."""

WORKSPACE_BYTES = 256 * 2**20
"""Most bytes of an engine's N x M buffers unless the caller says otherwise."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Queries that are negatives of the queries.

    Attributes:
        query: [L, D], the problem's own queries or those of all ranks.
        own: [N] int64, the row of ``query`` that is the query itself.
        id: [L] int64 or None, given exactly when the problem has ids.
    """

    query: Tensor
    own: Tensor
    id: Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Checked input of the engines; `mmemb.kernels.checks.prepare` makes it.

    Attributes:
        query: [N, D].
        candidate: [M, D], same dtype.
        scale: c = 1 / temperature, 0-d in `work_dtype`.
        positive: [N] int64, rows of ``candidate``; distinct if the symmetric loss is wanted.
        query_id: [N] int64 or None. Negatives with a query's id are left out.
        candidate_id: [M] int64; given exactly when ``query_id`` is.
        bound: upper bound of the absolute value of all logits, those of further negatives included.
        margin: negatives whose dot product exceeds the positive's by more than this are left out; None keeps all.
        peers: queries that are negatives too, or None.
        candidate_negatives: the other candidates are negatives of each query's positive too.
        hardness: b >= 0.
        dims: None, or ascending widths: the loss is the sum of the losses on the first ``d`` columns, each row
            normalised to length 1, over ``d`` in ``dims``. `mmemb.kernels.engines.solve` reduces these to problems
            without ``dims`` for an engine that does not know them.
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
        """What sums are kept in."""
        return work_dtype(self.query.dtype)

    @property
    def negative_scale(self) -> Tensor:
        """c + b, 0-d: what the dot products of negatives are multiplied by."""
        return self.scale + self.hardness

    def limits(self, own: Tensor) -> Tensor | None:
        """Logits above which a query's negatives are left out; None without a margin.

        A copy of the positive is kept at margin 0, although its logit comes from a sum in another order.

        Args:
            own: [..., N] the positives' logits p; the limits have its shape.
        """
        if self.margin is None:
            return None
        # In eps of the pair's lengths: a copy has them too. Two orders on a CPU differed by 5.5 at most (D = 32 to
        # 4096); tensor cores truncate a sum once in 16 terms.
        slack = max(8.0, self.query.shape[1] / 16) * torch.finfo(self.work_dtype).eps * self._pair_lengths()
        return (own / self.scale + self.margin + slack) * self.negative_scale

    def _pair_lengths(self) -> Tensor | float:
        """[N] length of every query times that of its positive; 1 with ``dims``, which normalise."""
        if self.dims is not None:
            return 1.0
        query, candidate = (
            torch.linalg.vector_norm(rows, dim=1, dtype=self.work_dtype) for rows in (self.query, self.candidate)
        )
        return query * candidate[self.positive]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of sum(coefficient * loss), in the work dtype: what is still to be added or multiplied is not rounded yet.

    Attributes:
        query: [N, D], as the rows of the problem alone.
        candidate: [M, D].
        temperature: 0-d.
        peers: [L, D] if the problem has peers: to be added to the gradients of the same queries.
    """

    query: Tensor
    candidate: Tensor
    temperature: Tensor
    peers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """What the symmetric loss knows of the columns of S.

    Attributes:
        others: [M] o' of each column's own query; of a column without one, the log-sum-exp of its logits.
        own: [M] logit p of the query whose positive the column is; 0 if there is none.
        share: [M] coefficient of that query's loss, halved; 0 if there is none.
    """

    others: Tensor
    own: Tensor
    share: Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
