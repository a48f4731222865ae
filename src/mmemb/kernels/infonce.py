"""InfoNCE: the contrastive loss of N queries against M candidates, with its gradients and no N x M matrix in memory.

    N queries   M candidates   D width
    S = Q K^T / temperature [N, M];  loss_i = logsumexp_j S_ij - S_i,positive(i)

`infonce` is differentiable in query, candidate and temperature. `infonce_with_grads` returns the gradients directly,
which is what a gradient cache needs.

The formula with every option is in `mmemb.kernels.problem`, the plain definition in `mmemb.kernels.reference`, and cost
and memory in `mmemb.kernels.tiled.engine`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from mmemb.kernels.checks import check_choices
from mmemb.kernels.operator import flat, infonce_op
from mmemb.kernels.options import InfoNCEBatch, LossOptions

Reduction: TypeAlias = Literal["mean", "none"]


class InfoNCEResult(NamedTuple):
    """A loss with its gradients.

    Attributes:
        loss: 0-d, float32 (float64 for float64 input).
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
    options: LossOptions | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Returns the loss, differentiable once in query, candidate and temperature.

    With ``mean`` the forward pass makes the gradients, if one is wanted, and keeps them. With ``none`` the backward
    pass makes them, since each query's incoming gradient is needed.

    Args:
        query: [N, D]; this and the next six as in `mmemb.kernels.InfoNCEBatch`.
        candidate: [M, D].
        temperature: positive number or one-element tensor.
        positive: [N] int64.
        query_id: [N] int64.
        candidate_id: [M] int64.
        weight: [N].
        options: which negatives count and how the loss is computed; None for the defaults.
        reduction: ``mean`` is sum(weight * loss) / sum(weight), ``none`` is weight * loss.

    Returns:
        0-d or [N] loss in float32 (float64 for float64 input).

    Raises:
        ValueError: an argument is not what it has to be, or a value is not finite. The message names what was given and
            what is allowed.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; allowed are 'mean' and 'none'")
    options = options or LossOptions()
    batch = InfoNCEBatch(query, candidate, temperature, positive, query_id, candidate_id, weight)
    batch.check(options)
    leaves = (query, candidate, temperature)
    wanted = torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return infonce_op(*flat(batch, options), reduction, wanted and reduction == "mean")[0]


@torch.no_grad()
def infonce_with_grads(
    batch: InfoNCEBatch, options: LossOptions | None = None, *, grad_dtype: torch.dtype | None = None
) -> InfoNCEResult:
    """Returns the mean loss and its gradients in one call, without an autograd graph.

    Args:
        batch: embeddings, temperature, ids and weights.
        options: which negatives count and how the loss is computed; None for the defaults.
        grad_dtype: the dtype of the embeddings' gradients; None for the embeddings' own. Gradients are summed in
            float32 (float64) and rounded once. Ask for float32 if a gradient scaler multiplies them afterwards: float16
            loses values below 6e-8, and a mean over many queries has such values.

    Raises:
        ValueError: as `infonce`.
    """
    check_choices(dtypes={"grad_dtype": grad_dtype})
    options = options or LossOptions()
    batch.check(options)
    loss, query_grad, candidate_grad, temperature_grad = infonce_op(*flat(batch, options), "mean", True)
    dtype = grad_dtype or batch.query.dtype
    return InfoNCEResult(loss, query_grad.to(dtype), candidate_grad.to(dtype), temperature_grad)
