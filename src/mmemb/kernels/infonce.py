"""InfoNCE: the contrastive loss of N queries against M candidates, with its gradients and no N x M matrix in memory.

    N queries   M candidates   D width
    S = Q K^T / temperature [N, M];  loss_i = logsumexp_j S_ij - S_i,positive(i)

`infonce` is differentiable in query, candidate and temperature; `infonce_with_grads` returns the gradients at once,
which is what a gradient cache needs. Both take ids to leave false negatives out, weights a query, and hard negatives as
further candidate rows. Cost and memory: `mmemb.kernels._infonce_tiled`; the plain definition:
`mmemb.kernels.reference`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmemb.kernels.engines import solve
from mmemb.kernels.problem import Problem, work_dtype

Reduction: TypeAlias = Literal["mean", "none"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class InfoNCEResult(NamedTuple):
    """A loss with its gradients.

    Attributes:
        loss: 0-d (``mean``) or [N] (``none``), float32 (float64 for float64 input).
        query_grad: [N, D] in the query's dtype.
        candidate_grad: [M, D] in the candidate's dtype.
        temperature_grad: 0-d, float32 (float64 for float64 input).
    """

    loss: Tensor
    query_grad: Tensor
    candidate_grad: Tensor
    temperature_grad: Tensor


def infonce(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: Tensor | float,
    positive: Tensor | None = None,
    query_id: Tensor | None = None,
    candidate_id: Tensor | None = None,
    weight: Tensor | None = None,
    symmetric: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss, differentiable once in query, candidate and temperature.

    With ``mean`` the gradients are made in the forward pass (when one is wanted) and kept; with ``none`` they are made
    in the backward pass, as each query's incoming gradient is needed.

    Args:
        query: [N, D] float32, bfloat16, float16 or float64.
        candidate: [M, D] of the same dtype and device. Rows that are no query's positive are hard negatives of all
            queries.
        temperature: positive number or one-element tensor; logits are divided by it.
        positive: [N] int64, each query's positive row of ``candidate``; default the diagonal (then M >= N).
        query_id: [N] int64 identities of the positives; with ``candidate_id``, candidates whose id equals a query's but
            which are not its positive are left out of its denominator.
        candidate_id: [M] int64.
        weight: [N], at least 0 with a positive sum; a constant: it gets no gradient.
        symmetric: mean of this direction and of each positive against all queries; positives must then be distinct.
        reduction: ``mean`` is sum(weight * loss) / sum(weight), ``none`` is weight * loss.

    Returns:
        0-d or [N] loss in float32 (float64 for float64 input).

    Raises:
        ValueError: what is said above does not hold, or a value is not finite; the message names what was given and
        what is allowed.
    """
    temperature = _as_tensor(temperature, query)
    problem, weight = prepare(
        query, candidate, temperature, positive, query_id, candidate_id, weight, symmetric, reduction
    )
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, candidate, temperature))
    if not wanted:
        losses, _ = solve(problem, coefficient=None, symmetric=symmetric)
        return _reduce(losses, weight, reduction)
    function: Any = _Mean if reduction == "mean" else _Rows
    return function.apply(query, candidate, temperature, problem, weight, symmetric)


@torch.no_grad()
def infonce_with_grads(
    query: Tensor,
    candidate: Tensor,
    *,
    temperature: Tensor | float,
    positive: Tensor | None = None,
    query_id: Tensor | None = None,
    candidate_id: Tensor | None = None,
    weight: Tensor | None = None,
    symmetric: bool = False,
    reduction: Reduction = "mean",
) -> InfoNCEResult:
    """The loss and its gradients in one call, without an autograd graph; arguments and errors as in `infonce`.

    With ``none`` the gradients are those of the losses' sum.
    """
    temperature = _as_tensor(temperature, query)
    problem, weight = prepare(
        query, candidate, temperature, positive, query_id, candidate_id, weight, symmetric, reduction
    )
    losses, gradients = solve(problem, coefficient=coefficients(problem, weight, reduction), symmetric=symmetric)
    assert gradients is not None
    loss = _reduce(losses, weight, reduction)
    return InfoNCEResult(loss, gradients.query, gradients.candidate, gradients.temperature)


class _Mean(torch.autograd.Function):
    """The weighted mean; gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        candidate: Tensor,
        temperature: Tensor,
        problem: Problem,
        weight: Tensor | None,
        both: bool,
    ) -> Tensor:
        losses, gradients = solve(problem, coefficient=coefficients(problem, weight, "mean"), symmetric=both)
        assert gradients is not None
        ctx.save_for_backward(
            gradients.query, gradients.candidate, gradients.temperature.to(temperature).view_as(temperature)
        )
        return _reduce(losses, weight, "mean")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * grad.to(saved) for saved in ctx.saved_tensors), None, None, None


class _Rows(torch.autograd.Function):
    """The losses by row; gradients made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        candidate: Tensor,
        temperature: Tensor,
        problem: Problem,
        weight: Tensor | None,
        both: bool,
    ) -> Tensor:
        losses, _ = solve(problem, coefficient=None, symmetric=both)
        ctx.save_for_backward(query, candidate, temperature)
        ctx.problem, ctx.weight, ctx.symmetric = problem, weight, both
        return _reduce(losses, weight, "none")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, temperature = ctx.saved_tensors  # raises if an input was changed in place since
        coefficient = grad if ctx.weight is None else grad * ctx.weight
        _, gradients = solve(ctx.problem, coefficient=coefficient.contiguous(), symmetric=ctx.symmetric)
        assert gradients is not None
        temperature_grad = gradients.temperature.to(temperature).view_as(temperature)
        return gradients.query, gradients.candidate, temperature_grad, None, None, None


def coefficients(problem: Problem, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """What each query's loss counts in the reduced loss, [N]."""
    n = len(problem.query)
    ones = problem.scale.new_ones(n) if weight is None else weight
    return ones / ones.sum() if reduction == "mean" else ones


def _reduce(losses: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses if weight is None else losses * weight
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def _as_tensor(temperature: Tensor | float, like: Tensor) -> Tensor:
    return (
        temperature
        if isinstance(temperature, Tensor)
        else torch.tensor(float(temperature), device=like.device, dtype=torch.float64)
    )


def prepare(
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    positive: Tensor | None,
    query_id: Tensor | None,
    candidate_id: Tensor | None,
    weight: Tensor | None,
    symmetric: bool,
    reduction: Reduction,
    *,
    own: range | None = None,
) -> tuple[Problem, Tensor | None]:
    """Checks the input of `infonce` and returns it in the engines' form, with the weights in the work dtype.

    ``own`` says that the queries are one rank's share: their positives are among these rows of ``candidate``,
    there may be no queries at all, and all their weights may be 0.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; allowed are 'mean' and 'none'")
    for name, tensor in (("query", query), ("candidate", candidate)):
        may_be_empty = name == "query" and own is not None
        if tensor.ndim != 2 or tensor.shape[1] == 0 or (len(tensor) == 0 and not may_be_empty):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed is [rows, width] with at least one of each"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    n, m = len(query), len(candidate)
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(f"query is {query.shape[1]} wide and candidate {candidate.shape[1]}; the widths must be equal")
    if query.dtype != candidate.dtype:
        raise ValueError(f"query is {query.dtype} and candidate {candidate.dtype}; the dtypes must be equal")
    if temperature.numel() != 1:
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}; allowed is one number")
    if positive is None and m < n:
        raise ValueError(
            f"{m} candidates for {n} queries; without positive= every query needs the candidate of its own row"
        )
    if (query_id is None) != (candidate_id is None):
        given, missing = ("query_id", "candidate_id") if candidate_id is None else ("candidate_id", "query_id")
        raise ValueError(f"{given} is given without {missing}; give both or neither")
    integers = {"positive": (positive, n), "query_id": (query_id, n), "candidate_id": (candidate_id, m)}
    for name, (ids, size) in integers.items():
        if ids is not None and (ids.shape != (size,) or ids.dtype != torch.int64):
            raise ValueError(
                f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; allowed is torch.int64 of shape ({size},)"
            )
    if weight is not None and (weight.shape != (n,) or not weight.is_floating_point()):
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; allowed is floating point of shape ({n},)"
        )
    others = {"candidate": candidate, "weight": weight} | {name: ids for name, (ids, _) in integers.items()}
    for name, other in others.items():
        if other is not None and other.device != query.device:
            raise ValueError(f"{name} is on {other.device} and query on {query.device}; all must be on one device")

    work = work_dtype(query.dtype)
    with torch.no_grad():
        scale = temperature.detach().to(query.device, work).reshape(()).reciprocal()
        index = torch.arange(n, device=query.device) if positive is None else positive
        weight = None if weight is None else weight.detach().to(work)
        bound = _check_values(query, candidate, scale, positive, weight, distinct=symmetric, own=own)
    return Problem(query.detach(), candidate.detach(), scale, index, query_id, candidate_id, bound), weight


def _check_values(
    query: Tensor,
    candidate: Tensor,
    scale: Tensor,
    positive: Tensor | None,
    weight: Tensor | None,
    *,
    distinct: bool,
    own: range | None,
) -> float:
    """Checks what shapes do not show and returns a bound of all logits; one transfer from the device in all."""
    work = scale.dtype
    if len(query) == 0:
        query, positive, weight = query.new_zeros(1, query.shape[1]), None, None
    facts = [torch.linalg.vector_norm(x, dim=1, dtype=work).amax().double() for x in (query, candidate)]
    facts.append(scale.double())
    if positive is not None:
        facts += [positive.amin().double(), positive.amax().double()]
        repeated = (positive.sort().values.diff() == 0).any() if distinct else positive.new_zeros(())
        facts.append(repeated.double())
    if weight is not None:
        facts += [weight.amin().double(), weight.sum().double()]
    values = torch.stack(facts).tolist()
    for name, norm in zip(("query", "candidate"), values, strict=False):
        if not norm < float("inf"):
            raise ValueError(f"{name} has a row of norm {norm}; every value must be finite")
    if not 0 < values[2] < float("inf"):
        raise ValueError(
            f"temperature is {1 / values[2] if values[2] else 'infinite'}; allowed are finite numbers above 0"
        )
    bound = values[0] * values[1] * values[2]
    if bound > torch.finfo(work).max / 4:
        raise ValueError(f"logits may reach {bound:.3g}; query, candidate or 1 / temperature is too large for {work}")
    if positive is not None:
        rows = range(len(candidate)) if own is None else own
        low, high, repeated_value = values[3:6]
        if low < rows.start or high >= rows.stop:
            raise ValueError(
                f"positive has values {low - rows.start:.0f} to {high - rows.start:.0f}; "
                f"allowed are rows of candidate, 0 to {len(rows) - 1}"
            )
        if repeated_value:
            raise ValueError(
                "positive names a candidate twice; the symmetric loss needs a candidate of its own for every query"
            )
    if weight is not None:
        low, total = values[-2:]
        if not (low >= 0 and (total > 0 or own is not None) and total < float("inf")):
            raise ValueError(
                f"weight has minimum {low} and sum {total}; allowed are finite numbers of at least 0, not all 0"
            )
    return bound
