"""`torch.ops.mmemb.infonce`: the loss as an operator that `torch.compile` and autograd know.

    N queries   M candidates   D width

There are three operators, and none of them builds a graph inside. ``infonce`` returns the loss and, on request, its
gradients. Its backward pass is ``infonce_chain``, which multiplies gradients that exist already, or
``infonce_backward``, which makes them for the incoming gradients. Both refuse a second derivative.

An operator takes tensors and plain values only. So `flat` takes a batch and its options apart here, and `_restored`
puts them together again inside the operator. Nothing else in the code base writes the long argument list.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mmemb.kernels.engines import solve
from mmemb.kernels.options import InfoNCEBatch, LossOptions
from mmemb.kernels.prepare import prepare
from mmemb.kernels.problem import Gradients, Problem, work_dtype

BATCH = (
    "Tensor query, Tensor candidate, Tensor temperature, Tensor? positive, Tensor? query_id, Tensor? candidate_id, "
    "Tensor? weight"
)
"""The fields of `InfoNCEBatch`, in order."""

OPTIONS = (
    "float? margin, bool query_negatives, bool candidate_negatives, float hardness, SymInt[]? dims, bool symmetric, "
    "str? engine, SymInt? workspace_bytes"
)
"""The fields of `LossOptions`, in order."""

ARGUMENTS = f"{BATCH}, {OPTIONS}, str reduction, bool gradients"

TENSORS, ALL = BATCH.count(",") + 1, ARGUMENTS.count(",") + 1
"""Number of tensors, and of all arguments, of ``infonce``."""

TEMPERATURE = 2
"""Where the temperature is among them."""


def flat(batch: InfoNCEBatch, options: LossOptions) -> tuple[Any, ...]:
    """The arguments of ``infonce``, all but the last two."""
    values = [getattr(part, field.name) for part in (batch, options) for field in fields(part)]
    values[TEMPERATURE] = batch.temperature_tensor()
    return tuple(values)


def _restored(arguments: tuple[Any, ...]) -> tuple[InfoNCEBatch, LossOptions]:
    """The batch and the options that `flat` took apart."""
    options = [tuple(value) if isinstance(value, list) else value for value in arguments[TENSORS : ALL - 2]]
    return InfoNCEBatch(*arguments[:TENSORS]), _options(*options)


@functools.lru_cache(maxsize=64)
def _options(*values: Any) -> LossOptions:
    """Options by their values. Each set is built, and so checked, once and not in every call."""
    return LossOptions(**{field.name: value for field, value in zip(fields(LossOptions), values, strict=True)})


# The checks read values on the host, which no CUDA graph can hold.
@torch.library.custom_op(
    "mmemb::infonce",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def infonce_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the reduced loss and, if ``gradients``, its gradients in the work dtype.

    With ``none`` they are those of the losses' sum. Without ``gradients``, empty tensors take their place. Gradients
    are not rounded to 16 bits here: a gradient scaler multiplies them by 65536 afterwards, and in float16 the small
    ones would be gone by then.
    """
    batch, options = _restored(arguments)
    reduction, gradients = arguments[-2:]
    problem, weight = prepare(batch, options)
    coefficient = _coefficient(problem, weight, reduction)
    losses, found = solve(problem, options, coefficient=coefficient if gradients else None)
    if reduction == "mean":
        return (losses * coefficient).sum(), *_joined(problem, found)
    return losses if weight is None else losses * weight, *_joined(problem, found)


@infonce_op.register_fake
def _(query: Tensor, candidate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, gradients = rest[-2:]
    work = work_dtype(query.dtype)
    loss = query.new_empty(() if reduction == "mean" else (query.shape[0],), dtype=work)
    if not gradients:
        empty = [query.new_empty(0, dtype=work) for _ in range(3)]
        return loss, empty[0], empty[1], empty[2]
    return loss, *_fake_gradients(query, candidate, work)


@torch.library.custom_op(
    "mmemb::infonce_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def infonce_backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients [N, D], [M, D] and 0-d (work dtype) for the gradient of the loss, ``grad`` [N] or 0-d."""
    batch, options = _restored(arguments)
    problem, weight = prepare(batch, options)
    coefficient = grad * _coefficient(problem, weight, arguments[-2])
    query_grad, candidate_grad, temperature_grad = _joined(problem, solve(problem, options, coefficient=coefficient)[1])
    dtype = batch.query.dtype
    return query_grad.to(dtype), candidate_grad.to(dtype), temperature_grad


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
    """Returns ``grad`` (0-d) times the gradients, rounded to the inputs' dtype.

    The inputs are arguments so that autograd asks for a second derivative, which `_refuse` then refuses.
    """
    grad = grad.to(temperature_grad.dtype)
    of_rows = [(rows * grad).to(query.dtype) for rows in (query_grad, candidate_grad)]
    return of_rows[0], of_rows[1], temperature_grad * grad


@infonce_backward_op.register_fake
@infonce_chain_op.register_fake
def _(grad: Tensor, query: Tensor, candidate: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(query, candidate, query.dtype)


def _fake_gradients(query: Tensor, candidate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What `_joined` returns, without values. Contiguous, whatever the layout of the inputs is."""
    temperature = query.new_empty((), dtype=work_dtype(query.dtype))
    return query.new_empty(query.shape, dtype=dtype), query.new_empty(candidate.shape, dtype=dtype), temperature


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("mmemb.kernels.infonce is differentiable once; a second derivative was asked for")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output[1:])
    ctx.plain = inputs[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, query_grad, candidate_grad, temperature_grad = ctx.saved_tensors  # raises if one was changed in place
    made_before = ctx.plain[-1]
    if made_before:
        found = infonce_chain_op(grad, *tensors[: TEMPERATURE + 1], query_grad, candidate_grad, temperature_grad)
    else:
        found = infonce_backward_op(grad.contiguous(), *tensors, *ctx.plain)
    query_grad, candidate_grad, temperature_grad = found
    temperature = tensors[TEMPERATURE]
    if ctx.needs_input_grad[TEMPERATURE]:
        # Moved before it is widened, since a float64 temperature may be on the CPU. Not moved if it is not needed.
        temperature_grad = temperature_grad.to(temperature.device).to(temperature.dtype).reshape(temperature.shape)
    else:
        temperature_grad = None
    return query_grad, candidate_grad, temperature_grad, *[None] * (ALL - 3)


infonce_op.register_autograd(_backward, setup_context=_save)
infonce_backward_op.register_autograd(_refuse)
infonce_chain_op.register_autograd(_refuse)


def _coefficient(problem: Problem, weight: Tensor | None, reduction: str) -> Tensor:
    """[N] what multiplies each query's loss before they are summed."""
    ones = problem.scale.new_ones(len(problem.query)) if weight is None else weight
    return ones / ones.sum() if reduction == "mean" else ones


def _joined(problem: Problem, gradients: Gradients | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the work dtype, contiguous, with the peers' added to the queries'. Empty tensors for none."""
    if gradients is None:
        return problem.scale.new_empty(0), problem.scale.new_empty(0), problem.scale.new_empty(0)
    query = gradients.query if gradients.peers is None else gradients.query + gradients.peers
    return query.contiguous(), gradients.candidate.contiguous(), gradients.temperature
