"""InfoNCE by its definition: the full N x M matrix and autograd. Tests and benchmarks compare with it.

N queries   M candidates   L columns of one kind of negative   D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


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
    reduction: str = "mean",
) -> Tensor:
    """Returns what `mmemb.kernels.infonce` returns, in the input's own dtype, without checks and in O(N M) memory."""
    n = len(query)
    rows = torch.arange(n, device=query.device)
    positive = rows if positive is None else positive
    losses = query.new_zeros(n)
    for dim in dims or (None,):
        q, k = (query, candidate) if dim is None else (_unit(x[:, :dim]) for x in (query, candidate))
        dots = q @ k.T  # [N, M]
        own = dots[rows, positive]

        def negatives(dots: Tensor, none: Tensor, ids: Tensor | None, own: Tensor) -> Tensor:
            """Logits [N, L] of the negatives. ``none`` [N] is the column of each row that is no negative."""
            out = torch.zeros_like(dots, dtype=torch.bool)
            if query_id is not None and ids is not None:
                out |= query_id[:, None] == ids
            if margin is not None:
                out |= dots > own + margin
            out[rows, none] = True
            return (dots / temperature + hardness * dots.detach()).masked_fill(out, -torch.inf)

        extra = [(own / temperature)[:, None]]  # the positive at 0
        if query_negatives:
            extra.append(negatives(q @ q.T, rows, query_id, own[:, None]))
        if candidate_negatives:
            extra.append(negatives(k[positive] @ k.T, positive, candidate_id, own[:, None]))
        first = torch.zeros_like(rows)
        by_row = torch.cat([*extra, negatives(dots, positive, candidate_id, own[:, None])], 1)
        loss = cross_entropy(by_row, first, reduction="none")
        if symmetric:
            ids = None if candidate_id is None else candidate_id[positive]
            by_column = torch.cat([*extra, negatives(dots[:, positive], rows, ids, own[None]).T], 1)
            loss = (loss + cross_entropy(by_column, first, reduction="none")) / 2
        losses = losses + loss
    if reduction == "none":
        return losses if weight is None else losses * weight
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, even for very short rows: `torch.nn.functional.normalize` divides by 1e-12 at least."""
    return rows / rows.norm(dim=1, keepdim=True)
