"""InfoNCE: the contrastive loss of N queries against M candidates, with its gradients and no N x M matrix in memory.

    N queries   M candidates   D width
    S = Q K^T / temperature [N, M];  loss_i = logsumexp_j S_ij - S_i,positive(i)

`infonce` is differentiable in query, candidate and temperature; `infonce_with_grads` returns the gradients at once,
which is what a gradient cache needs. The loss with every option, as a formula: `mmemb.kernels.problem`; the plain
definition: `mmemb.kernels.reference`; cost and memory: `mmemb.kernels.tiled.engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmemb.kernels.checks import Reduction, Tensors, as_temperature, check_choices, check_form, prepare
from mmemb.kernels.engines import Engine, solve
from mmemb.kernels.operator import infonce_op

__all__ = ["InfoNCEResult", "Reduction", "infonce", "infonce_with_grads", "prepare", "solve"]


class InfoNCEResult(NamedTuple):
    """A loss with its gradients.

    Attributes:
        loss: 0-d (``mean``) or [N] (``none``), float32 (float64 for float64 input).
        query_grad: [N, D] in the embeddings' dtype unless another was asked for.
        candidate_grad: [M, D] likewise.
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
    margin: float | None = None,
    query_negatives: bool = False,
    candidate_negatives: bool = False,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    workspace_bytes: int | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """The loss, differentiable once in query, candidate and temperature.

    With ``mean`` the gradients are made in the forward pass (when one is wanted) and kept; with ``none`` they are made
    in the backward pass, as each query's incoming gradient is needed.

    Args:
        query: [N, D] float32, bfloat16, float16 or float64.
        candidate: [M, D] of the same dtype and device. Rows that are no query's positive are hard negatives of all
            queries, however many of them a query came with.
        temperature: positive number or one-element tensor; logits are divided by it.
        positive: [N] int64, each query's positive row of ``candidate``; default the diagonal (then M >= N).
        query_id: [N] int64 identities of the positives; with ``candidate_id``, negatives whose id equals a query's are
            left out of its denominator.
        candidate_id: [M] int64.
        weight: [N], at least 0 with a positive sum; a constant: it gets no gradient.
        margin: negatives whose dot product is above the positive's plus this are left out as false negatives
            (Qwen3-Embedding, arXiv 2506.05176, uses 0.1); copies of the positive are kept, at 0 too. In the other
            direction of the symmetric loss the positive's is the candidate's own.
        query_negatives: the other queries are negatives of each query (GTE, arXiv 2308.03281; Qwen3-Embedding). As
            negatives of the pair they stand in both directions' denominators.
        candidate_negatives: the other candidates are negatives of each query's positive (the same papers).
        hardness: at least 0: exp(hardness * dot product) is the weight of a negative's exponential, a constant for the
            gradient (LLaVE, arXiv 2503.04812).
        dims: ascending widths up to D: the sum of the losses on the first ``dim`` columns, each row normalised
            (Matryoshka representations, arXiv 2205.13147). The inputs need not be normalised then.
        symmetric: mean of this direction and of each positive against all queries; positives must then be distinct.
        reduction: ``mean`` is sum(weight * loss) / sum(weight), ``none`` is weight * loss.
        workspace_bytes: most bytes of the engine's N x M buffers; None for its own choice.
        engine: ``tiled`` or ``triton``; None chooses by device, see `mmemb.kernels.engines`.

    Returns:
        0-d or [N] loss in float32 (float64 for float64 input).

    Raises:
        ValueError: what is said above does not hold, or a value is not finite; the message names what was given and
        what is allowed.
    """
    temperature = as_temperature(temperature)
    leaves = (query, candidate, temperature)
    wanted = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in leaves)  # not checked yet
    return _call(
        (query, candidate, temperature, positive, query_id, candidate_id, weight),
        (margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction),
        (wanted and reduction == "mean", workspace_bytes, engine),
    )[0]


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
    margin: float | None = None,
    query_negatives: bool = False,
    candidate_negatives: bool = False,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    workspace_bytes: int | None = None,
    engine: Engine | None = None,
    grad_dtype: torch.dtype | None = None,
) -> InfoNCEResult:
    """The loss and its gradients in one call, without an autograd graph; arguments and errors as in `infonce`.

    With ``none`` the gradients are those of the losses' sum. They are summed in float32 (float64) and rounded once, to
    ``grad_dtype`` or the embeddings' dtype. What a gradient scaler multiplies afterwards should be asked for in
    float32: in float16 gradients below 6e-8 vanish, and a mean over many queries has such.
    """
    check_choices(dtypes={"grad_dtype": grad_dtype})
    found = _call(
        (query, candidate, as_temperature(temperature), positive, query_id, candidate_id, weight),
        (margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction),
        (True, workspace_bytes, engine),
    )
    query_grad, candidate_grad = (rows.to(grad_dtype or query.dtype) for rows in found[1:3])
    return InfoNCEResult(found[0], query_grad, candidate_grad, found[3])


def _call(tensors: Tensors, options: tuple[Any, ...], how: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operator, after the checks that it could not make before it is dispatched by device."""
    margin, query_negatives, candidate_negatives, hardness, dims, symmetric, reduction = options
    check_choices(query_negatives=query_negatives, candidate_negatives=candidate_negatives, symmetric=symmetric)
    check_form(*tensors, reduction, margin=margin, hardness=hardness, dims=dims, workspace_bytes=how[1])
    margin = None if margin is None else float(margin)
    dims = None if dims is None else list(dims)
    return infonce_op(*tensors, margin, *options[1:3], float(hardness), dims, *options[5:], *how)
