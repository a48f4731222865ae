"""InfoNCE with both embedding gradients in plain torch, a stripe of query rows at a time: the engine of any device.

    N queries   M candidates   D width   R rows of a stripe
    Q [N, D]    K [M, D]       S = Q K^T / temperature [N, M], of which only R rows exist at once

A stripe holds complete rows, so one direction needs S once: its exponentials E give the log-sum-exp, dQ = E K and dK +=
E^T Q, with the softmax's 1/Z folded into the narrow side ([R, D]) instead of the wide one ([R, M]). That is three
matrix products, the floor. The symmetric loss needs the log-sum-exp of every column before the first gradient and makes
S twice: four products. The temperature's gradient costs nothing: sum(G * S) = sum(Q * dQ) for G = dL/dS.

Accumulation is float32 (float64 for float64 input); memory beyond inputs and gradients is R x M (twice that if
symmetric).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Merge: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ROWS = 1024
"""Rows of a stripe: 1024 measured best on CPU (1.03-1.11 of the floor; 256 rows: 1.15-1.35)."""

SAFE_LOGIT = 40.0
"""Up to this bound of |S| no maximum is subtracted: exp(+-40) and sums of 2^40 of them are normal float32 numbers."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Checked input of the engines.

    Attributes:
        query: [N, D].
        candidate: [M, D], same dtype.
        scale: 1 / temperature, 0-d in `work_dtype`.
        positive: [N] int64, rows of ``candidate``.
        query_id: [N] int64 or None. Candidates with a query's id that are not its positive are left out.
        candidate_id: [M] int64; given exactly when ``query_id`` is.
        bound: upper bound of \\|S\\|.
    """

    query: Tensor
    candidate: Tensor
    scale: Tensor
    positive: Tensor
    query_id: Tensor | None
    candidate_id: Tensor | None
    bound: float

    @property
    def work_dtype(self) -> torch.dtype:
        """What sums are kept in."""
        return work_dtype(self.query.dtype)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of sum(coefficient * loss): query [N, D] and candidate [M, D] as the input, temperature 0-d in the work dtype."""

    query: Tensor
    candidate: Tensor
    temperature: Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        """The stripe's scaled queries [R, D], S [R, M] (masked: -inf) in the shared buffer, S at the positives [R]."""
        problem = self.problem
        query = problem.query[rows].to(problem.work_dtype) * problem.scale
        positive = problem.positive[rows, None]
        logits = torch.mm(query, self.candidate.T, out=self.logits[: len(query)])
        if problem.query_id is not None and problem.candidate_id is not None:
            mask = torch.eq(problem.query_id[rows, None], problem.candidate_id[None], out=self.mask[: len(query)])
            logits.masked_fill_(mask.scatter_(1, positive, False), -torch.inf)
        return query, logits, logits.gather(1, positive)[:, 0]


def exponentials_(logits: Tensor, *, bound: float) -> tuple[Tensor, Tensor]:
    """Turns S [R, M] into exp(S - shift) in place; the row sums Z [R] and log-sum-exps [R]."""
    if bound <= SAFE_LOGIT:
        total = logits.exp_().sum(1)
        return total, total.log()
    shift = logits.amax(1)
    total = logits.sub_(shift[:, None]).exp_().sum(1)
    return total, total.log() + shift


def one_direction(problem: Problem, *, coefficient: Tensor | None, rows: int = ROWS) -> tuple[Tensor, Gradients | None]:
    """Losses [N] of the queries and, given coefficients [N], the gradients of sum(coefficient * loss)."""
    stripes = _Stripes(problem, rows)
    losses = stripes.logits.new_empty(len(problem.query))
    query_grad = torch.empty_like(problem.query) if coefficient is not None else None
    candidate_grad = torch.zeros_like(stripes.candidate) if coefficient is not None else None
    temperature_grad = losses.new_zeros(())
    for part in stripes.slices():
        query, logits, positive_logit = stripes(part)
        total, log_sum = exponentials_(logits, bound=problem.bound)
        losses[part] = log_sum - positive_logit
        if coefficient is None or query_grad is None or candidate_grad is None:
            continue
        share = coefficient[part, None]
        grad = torch.mm(logits, stripes.candidate).mul_(share / total[:, None])
        grad.addcmul_(stripes.candidate[problem.positive[part]], share, value=-1)
        temperature_grad -= torch.linalg.vecdot(grad.flatten(), query.flatten())
        query_grad[part] = grad.mul_(problem.scale)
        candidate_grad.addmm_(logits.T, query * (share / total[:, None]))
        candidate_grad.index_add_(0, problem.positive[part], query * share, alpha=-1)
    return losses, _gradients(problem, query_grad, candidate_grad, temperature_grad)


def column_log_sum(problem: Problem, *, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Losses [N] of the row direction and the log-sum-exp [M] of every column of S: the symmetric loss's first pass."""
    stripes = _Stripes(problem, rows)
    losses = stripes.logits.new_empty(len(problem.query))
    columns = stripes.logits.new_full((len(problem.candidate),), -torch.inf)
    for part in stripes.slices():
        _, logits, positive_logit = stripes(part)
        columns = torch.logaddexp(columns, logits.logsumexp(0))
        losses[part] = exponentials_(logits, bound=problem.bound)[1] - positive_logit
    return losses, columns


def symmetric(
    problem: Problem, *, coefficient: Tensor | None, rows: int = ROWS, merge: Merge | None = None
) -> tuple[Tensor, Gradients | None]:
    """As `one_direction`, for the mean of each query's loss and its positive's loss against all queries.

    Positives are distinct. ``merge`` joins the columns' log-sum-exps [M] and coefficients [M] with those of further
    queries elsewhere.
    """
    row_losses, columns = column_log_sum(problem, rows=rows)
    column_share = torch.zeros_like(columns)
    if coefficient is not None:
        column_share[problem.positive] = coefficient / 2
    if merge is not None:
        columns, column_share = merge(columns, column_share)
    stripes = _Stripes(problem, rows)
    second = torch.empty_like(stripes.logits)
    losses = torch.empty_like(row_losses)
    query_grad = torch.empty_like(problem.query) if coefficient is not None else None
    candidate_grad = torch.zeros_like(stripes.candidate) if coefficient is not None else None
    temperature_grad = losses.new_zeros(())
    # A column that is nobody's positive has no loss: +inf makes its softmax exactly 0, also where all of it is masked.
    owned = columns.where(column_share > 0, torch.inf)
    for part in stripes.slices():
        query, logits, positive_logit = stripes(part)
        losses[part] = (row_losses[part] + columns[problem.positive[part]] - positive_logit) / 2
        if coefficient is None or query_grad is None or candidate_grad is None:
            continue
        share = coefficient[part, None]
        column = torch.sub(logits, owned, out=second[: len(query)]).exp_().mul_(column_share)
        logits.sub_((row_losses[part] + positive_logit)[:, None]).exp_().mul_(share / 2).add_(column)
        grad = torch.mm(logits, stripes.candidate)
        grad.addcmul_(stripes.candidate[problem.positive[part]], share, value=-1)
        temperature_grad -= torch.linalg.vecdot(grad.flatten(), query.flatten())
        query_grad[part] = grad.mul_(problem.scale)
        candidate_grad.addmm_(logits.T, query)
        candidate_grad.index_add_(0, problem.positive[part], query * share, alpha=-1)
    return losses, _gradients(problem, query_grad, candidate_grad, temperature_grad)


def _gradients(
    problem: Problem, query_grad: Tensor | None, candidate_grad: Tensor | None, temperature_grad: Tensor
) -> Gradients | None:
    if query_grad is None or candidate_grad is None:
        return None
    # The sums held -sum(G * S); S = Q K^T * scale, so d/d temperature is that times the scale.
    return Gradients(query_grad, candidate_grad.to(problem.candidate.dtype), temperature_grad * problem.scale)
