"""InfoNCE with both embedding gradients in plain torch, a stripe of query rows at a time: the engine of any device.

    N queries   M candidates   D width   R rows of a stripe
    Q [N, D]    K [M, D]       S = Q K^T / temperature [N, M], of which only R rows exist at once
    p_i the positive's logit of query i     o_i log-sum-exp of its other logits

A stripe holds complete rows, so one direction needs S once: its exponentials give o, dQ = E K and dK += E^T Q, with the
softmax's denominator folded into the narrow side ([R, D]) instead of the wide one ([R, M]). That is three matrix
products, the floor. The symmetric loss needs the log-sum-exp of every column before the first gradient and makes S
twice: four products. The temperature's gradient costs nothing: sum(G * S) = sum(Q * dQ) for G = dL/dS.

The positive is kept out of the sums: loss = log(1 + exp(o - p)) and G at the positive = -sigmoid(o - p), so that small
losses and gradients keep their relative precision (log-sum-exp minus p would leave only rounding of 1 / temperature).

Accumulation is float32 (float64 for float64 input); memory beyond inputs and gradients is R x M (twice that if
symmetric).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmemb.kernels.problem import Columns, Gradients, Merge, Problem

ROWS = 1024
"""Rows of a stripe: 1024 measured best on CPU (1.03-1.11 of the floor; 256 rows: 1.15-1.35)."""

SAFE_LOGIT = 40.0
"""Up to this bound of |S| no maximum is subtracted: exp(+-40) and sums of 2^40 of them are normal float32 numbers."""


class _Stripes:
    """The buffers of one call, and S by stripe."""

    def __init__(self, problem: Problem, rows: int) -> None:
        self.problem = problem
        n, m = len(problem.query), len(problem.candidate)
        self.rows = max(1, min(rows, n))
        self.candidate = problem.candidate.to(problem.work_dtype)
        self.logits = self.candidate.new_empty(self.rows, m)
        masked = problem.query_id is not None
        self.mask = self.logits.new_empty(self.rows if masked else 0, m, dtype=torch.bool)

    def slices(self) -> list[slice]:
        n = len(self.problem.query)
        return [slice(start, min(start + self.rows, n)) for start in range(0, n, self.rows)]

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The stripe's scaled queries [R, D], its other logits [R, M] in the shared buffer, its positives' logits [R].

        Positive and masked entries are -inf.
        """
        problem = self.problem
        query = problem.query[rows].to(problem.work_dtype) * problem.scale
        positive = problem.positive[rows, None]
        logits = torch.mm(query, self.candidate.T, out=self.logits[: len(query)])
        own = logits.gather(1, positive)[:, 0]
        if problem.query_id is not None and problem.candidate_id is not None:
            mask = torch.eq(problem.query_id[rows, None], problem.candidate_id[None], out=self.mask[: len(query)])
            logits.masked_fill_(mask, -torch.inf)
        return query, logits.scatter_(1, positive, -torch.inf), own


class _Sums:
    """The gradients while they are summed up; ``add`` takes G K [R, D], ``query`` the scaled queries."""

    def __init__(self, problem: Problem, stripes: _Stripes) -> None:
        self.problem = problem
        self.query = torch.empty_like(problem.query)
        self.candidate = torch.zeros_like(stripes.candidate)
        self.temperature = stripes.candidate.new_zeros(())

    def add(self, rows: slice, *, query: Tensor, product: Tensor, wide: Tensor, narrow: Tensor) -> None:
        """Adds a stripe: ``product`` = G K [R, D], and G^T Q as ``wide`` [R, M] transposed times ``narrow`` [R, D]."""
        self.temperature -= torch.linalg.vecdot(product.flatten(), query.flatten())
        self.query[rows] = product.mul_(self.problem.scale)
        self.candidate.addmm_(wide.T, narrow)

    def result(self) -> Gradients:
        # The sum held -sum(G * S); S = Q K^T * scale, so d/d temperature is that times the scale.
        candidate = self.candidate.to(self.problem.candidate.dtype)
        return Gradients(self.query, candidate, self.temperature * self.problem.scale)


def exponentials_(logits: Tensor, *, bound: float) -> tuple[Tensor, Tensor | float]:
    """Turns logits [R, M] into exp(logits - shift) in place; returns the row sums [R] and the shift [R] or 0."""
    if bound <= SAFE_LOGIT:
        return logits.exp_().sum(1), 0.0
    # A row may be -inf throughout: -inf minus a finite shift stays -inf.
    shift = logits.amax(1).clamp_min_(torch.finfo(logits.dtype).min)
    return logits.sub_(shift[:, None]).exp_().sum(1), shift


def excess_loss(excess: Tensor) -> Tensor:
    """log(1 + exp(o - p)), exact to rounding however small or large."""
    return torch.logaddexp(excess, torch.zeros_like(excess))


def one_direction(
    problem: Problem, *, coefficient: Tensor | None, rows: int = ROWS, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """Losses [N] of the queries and, given coefficients [N], the gradients of sum(coefficient * loss)."""
    stripes = _Stripes(problem, rows)
    losses = stripes.logits.new_empty(len(problem.query))
    sums = None if coefficient is None else _Sums(problem, stripes)
    for part in stripes.slices():
        query, logits, own = stripes(part)
        total, shift = exponentials_(logits, bound=problem.bound)
        losses[part] = excess_loss(total.log() + shift - own)
        if coefficient is None or sums is None:
            continue
        # Softmax = E * exp(shift - log-sum-exp), and log-sum-exp = p + loss; it sums to 0 with the positive's entry.
        logits.scatter_(1, problem.positive[part, None], -total[:, None])
        share = (coefficient[part] * (shift - own - losses[part]).exp())[:, None]
        product = torch.mm(logits, stripes.candidate).mul_(share)
        sums.add(part, query=query, product=product, wide=logits, narrow=query * share)
    return losses, sums.result() if sums is not None else None


def symmetric(
    problem: Problem,
    *,
    coefficient: Tensor | None,
    rows: int = ROWS,
    merge: Merge | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Gradients | None]:
    """As `one_direction`, for the mean of each query's loss and its positive's loss against all queries.

    Positives are distinct. ``merge`` joins the columns with those of further queries elsewhere.
    """
    row_excess, own, columns = _first_pass(problem, coefficient, rows)
    if merge is not None:
        columns = merge(columns)
    column_excess = columns.others[problem.positive] - own
    row_losses = excess_loss(row_excess)
    losses = (row_losses + excess_loss(column_excess)) / 2
    if coefficient is None:
        return losses, None
    # A column that is nobody's positive has no loss: +inf makes its softmax exactly 0, also where all of it is masked.
    column_sum = torch.logaddexp(columns.others, columns.own).where(columns.share != 0, torch.inf)
    at_positive = -coefficient / 2 * (row_excess.sigmoid() + column_excess.sigmoid())
    stripes = _Stripes(problem, rows)
    second = torch.empty_like(stripes.logits)
    sums = _Sums(problem, stripes)
    for part in stripes.slices():
        query, logits, _ = stripes(part)
        by_column = torch.sub(logits, column_sum, out=second[: len(query)]).exp_().mul_(columns.share)
        logits.sub_((row_losses[part] + own[part])[:, None]).exp_().mul_(coefficient[part, None] / 2).add_(by_column)
        logits.scatter_(1, problem.positive[part, None], at_positive[part, None])
        sums.add(part, query=query, product=torch.mm(logits, stripes.candidate), wide=logits, narrow=query)
    return losses, sums.result()


def _first_pass(problem: Problem, coefficient: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Columns]:
    """o - p of the rows [N], the positives' logits p [N], and the columns of S."""
    stripes = _Stripes(problem, rows)
    excess, own = stripes.logits.new_empty(2, len(problem.query))
    others = stripes.logits.new_full((len(problem.candidate),), -torch.inf)
    for part in stripes.slices():
        _, logits, own[part] = stripes(part)
        others = torch.logaddexp(others, logits.logsumexp(0))
        total, shift = exponentials_(logits, bound=problem.bound)
        excess[part] = total.log() + shift - own[part]
    share = torch.zeros_like(others)
    if coefficient is not None:
        share[problem.positive] = coefficient / 2
    return excess, own, Columns(others, torch.zeros_like(others).index_copy_(0, problem.positive, own), share)
