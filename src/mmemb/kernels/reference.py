"""InfoNCE as defined, over the full N x M matrix with autograd: the tests' oracle and the benchmarks' baseline."""

from __future__ import annotations

import torch
from torch import Tensor


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
    reduction: str = "mean",
) -> Tensor:
    """As `mmemb.kernels.infonce`, in the input's own dtype, without checks: O(N M) memory."""
    n = len(query)
    rows = torch.arange(n, device=query.device)
    positive = rows if positive is None else positive
    logits = query @ candidate.T / temperature  # [N, M]
    if query_id is not None and candidate_id is not None:
        same = query_id[:, None] == candidate_id
        same[rows, positive] = False
        logits = logits.masked_fill(same, -torch.inf)
    losses = torch.nn.functional.cross_entropy(logits, positive, reduction="none")
    if symmetric:
        losses = (losses + torch.nn.functional.cross_entropy(logits.T[positive], rows, reduction="none")) / 2
    if reduction == "none":
        return losses if weight is None else losses * weight
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
