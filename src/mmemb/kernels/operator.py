"""`torch.ops.mmemb.infonce`: the loss as an operator that `torch.compile` and autograd know.

Three operators, none of which makes a graph inside. ``infonce`` gives the loss and, where asked for, its gradients;
its backward pass is ``infonce_chain``, which multiplies gradients made before, or ``infonce_backward``, which makes
them for the gradients that come in. Both refuse a second derivative. Arguments are those of `mmemb.kernels.infonce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmemb.kernels.checks import Tensors, prepare
from mmemb.kernels.engines import solve
from mmemb.kernels.problem import Gradients, Peers, Problem, work_dtype

TENSORS = 7
"""The first arguments of ``infonce``."""


# The checks read values on the host, which no CUDA graph can hold.
@torch.library.custom_op("mmemb::infonce", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def infonce_op(
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    positive: Tensor | None,
    query_id: Tensor | None,
    candidate_id: Tensor | None,
    weight: Tensor | None,
    margin: float | None,
    query_negatives: bool,
    candidate_negatives: bool,
    hardness: float,
    dims: Sequence[int] | None,
    symmetric: bool,
    reduction: str,
    gradients: bool,
    workspace_bytes: int | None,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss and, if ``gradients``, its gradients in the work dtype (of the losses' sum for ``none``).

    Otherwise empty tensors stand for them. They are rounded by who knows that nothing will multiply them any more: a
    gradient scaler's 65536 comes after this, and in float16 what is below 6e-8 would be gone.
    """
    problem, weight = _prepare(
        (query, candidate, temperature, positive, query_id, candidate_id, weight),
        (margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction),
    )
    ones = problem.scale.new_ones(len(query)) if weight is None else weight
    coefficient = ones / ones.sum() if reduction == "mean" else ones
    losses, found = solve(
        problem,
        coefficient=coefficient if gradients else None,
        symmetric=symmetric,
        workspace_bytes=workspace_bytes,
        engine=engine,
    )
    loss = (losses * coefficient).sum() if reduction == "mean" else losses if weight is None else losses * weight
    return loss, *_joined(problem, found)


@infonce_op.register_fake
def _(query: Tensor, candidate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, gradients = rest[11:13]
    work = work_dtype(query.dtype)
    loss = query.new_empty(() if reduction == "mean" else (query.shape[0],), dtype=work)
    if not gradients:
        empty = [query.new_empty(0, dtype=work) for _ in range(3)]
        return loss, empty[0], empty[1], empty[2]
    return loss, *_fake_gradients(query, candidate, work)


@torch.library.custom_op("mmemb::infonce_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def infonce_backward_op(
    grad: Tensor,
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    positive: Tensor | None,
    query_id: Tensor | None,
    candidate_id: Tensor | None,
    weight: Tensor | None,
    margin: float | None,
    query_negatives: bool,
    candidate_negatives: bool,
    hardness: float,
    dims: Sequence[int] | None,
    symmetric: bool,
    reduction: str,
    gradients: bool,
    workspace_bytes: int | None,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, D], [M, D] and the temperature's (0-d, work dtype) for the loss's, ``grad`` [N] or 0-d."""
    problem, weight = _prepare(
        (query, candidate, temperature, positive, query_id, candidate_id, weight),
        (margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction),
    )
    ones = problem.scale.new_ones(len(query)) if weight is None else weight
    coefficient = grad * (ones / ones.sum() if reduction == "mean" else ones)
    _, found = solve(
        problem,
        coefficient=coefficient,
        symmetric=symmetric,
        workspace_bytes=workspace_bytes,
        engine=engine,
    )
    query_grad, candidate_grad, temperature_grad = _joined(problem, found)
    return query_grad.to(query.dtype), candidate_grad.to(query.dtype), temperature_grad


@torch.library.custom_op("mmemb::infonce_chain", mutates_args=())
def infonce_chain_op(
    grad: Tensor,
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    query_grad: Tensor,
    candidate_grad: Tensor,
    temperature_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad`` (0-d) times the gradients, rounded to the inputs' dtype; the inputs are there for the refusal below."""
    grad = grad.to(temperature_grad.dtype)
    of_rows = [(rows * grad).to(query.dtype) for rows in (query_grad, candidate_grad)]
    return of_rows[0], of_rows[1], temperature_grad * grad


@infonce_backward_op.register_fake
@infonce_chain_op.register_fake
def _(grad: Tensor, query: Tensor, candidate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(query, candidate, query.dtype)


def _fake_gradients(query: Tensor, candidate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `_joined`, without values: contiguous, whatever the layout of the inputs."""
    temperature = query.new_empty((), dtype=work_dtype(query.dtype))
    return query.new_empty(query.shape, dtype=dtype), query.new_empty(candidate.shape, dtype=dtype), temperature


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("mmemb.kernels.infonce is differentiable once; a second derivative was asked for")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output[1:])
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, query_grad, candidate_grad, temperature_grad = ctx.saved_tensors  # raises if one was changed in place
    made_before = ctx.options[-3]
    if made_before:
        found = infonce_chain_op(grad, *tensors[:3], query_grad, candidate_grad, temperature_grad)
    else:
        found = infonce_backward_op(grad.contiguous(), *tensors, *ctx.options)
    query_grad, candidate_grad, temperature_grad = found
    temperature = tensors[2]
    if ctx.needs_input_grad[2]:
        # Moved before it is widened, where the temperature is a float64 number on the CPU; not moved for nothing.
        temperature_grad = temperature_grad.to(temperature.device).to(temperature.dtype).reshape(temperature.shape)
    else:
        temperature_grad = None
    return query_grad, candidate_grad, temperature_grad, *[None] * (TENSORS - 3 + len(ctx.options))


infonce_op.register_autograd(_backward, setup_context=_save)
infonce_backward_op.register_autograd(_refuse)
infonce_chain_op.register_autograd(_refuse)


def _prepare(tensors: Tensors, options: tuple[Any, ...]) -> tuple[Problem, Tensor | None]:
    query, query_id = tensors[0], tensors[4]
    margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction = options
    own = torch.arange(len(query), device=query.device)
    return prepare(
        *tensors,
        symmetric=symmetric,
        reduction=reduction,
        margin=margin,
        peers=Peers(query, own, query_id) if query_negatives else None,
        candidate_negatives=candidate_negatives,
        hardness=hardness,
        dims=dims,
    )


def _joined(problem: Problem, gradients: Gradients | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the work dtype, contiguous, the peers' among their queries'; empty tensors for none."""
    if gradients is None:
        return problem.scale.new_empty(0), problem.scale.new_empty(0), problem.scale.new_empty(0)
    query = gradients.query if gradients.peers is None else gradients.query + gradients.peers
    return query.contiguous(), gradients.candidate.contiguous(), gradients.temperature
