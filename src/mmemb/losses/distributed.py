"""InfoNCE across ranks: every rank scores its own queries against the candidates of all ranks.

    n, m this rank's queries and candidates   N, M those of all ranks, in rank order   D width   W ranks

Each rank computes n x M logits only. Candidates are gathered on all ranks. Their gradients are summed over ranks and
scattered back to their owners.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from mmemb.kernels.engines import solve
from mmemb.kernels.infonce import InfoNCEResult
from mmemb.kernels.options import InfoNCEBatch, LossOptions
from mmemb.kernels.prepare import prepare
from mmemb.kernels.problem import Columns, Peers, Problem, work_dtype
from mmemb.losses.agreement import Rows, agree, refusing_together, share_of_all
from mmemb.losses.collectives import all_sum, gather_rows, scatter_row_sum, world_size


@torch.no_grad()
def distributed_infonce_with_grads(
    batch: InfoNCEBatch,
    options: LossOptions | None = None,
    *,
    averaged: bool = True,
    gather_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
) -> InfoNCEResult:
    """Returns the mean loss over the queries of all ranks, with its gradients for this rank's rows.

    Needs a process group, and every rank must call it. For a single process take `mmemb.kernels.infonce_with_grads`.

    Args:
        batch: this rank's rows, [n, D] and [m, D]. A rank may have no queries, no candidates or neither. ``positive``
            holds rows of this rank's ``candidate``. Ids are comparable across ranks. The temperature is the same on all
            ranks, up to `mmemb.losses.agreement.SAME_TEMPERATURE`. ``positive`` and ``weight`` may be missing on some
            ranks. The mean is sum(weight * loss) / sum(weight) over all ranks.
        options: equal on all ranks, except for ``workspace_bytes``. Further negatives come from all ranks.
        averaged: the parameters' gradients will be averaged over ranks, as DDP and FSDP do. The returned gradients of
            embeddings then carry a factor W, and the average is the gradient that one process finds for the whole
            batch. If False there is no factor, and the sum over ranks is that gradient.
        gather_dtype: the dtype to which candidates (and queries that are negatives) are rounded before they travel,
            e.g. `torch.bfloat16` for half the bytes of float32. Every rank then scores the rounded rows, its own
            included. Their gradients are not rounded to it. None sends them as they are. No effect on one rank.
        grad_dtype: see `mmemb.kernels.infonce_with_grads`; may differ between ranks.

    Returns:
        The global loss, equal on all ranks; the gradients of this rank's rows [n, D] and [m, D]; the temperature's
        gradient, which is the global one on every rank if ``averaged``, and otherwise this rank's share of it. The
        ranks' parts of a gradient travel and are summed in float32 (float64). Only the sum is rounded.

    Raises:
        ValueError: see `mmemb.losses.agreement.agree` and `mmemb.kernels.infonce`. The rank whose input is wrong names
            the reason; the others report that a rank refused its own. A rank that fails later, in a collective or in
            the engine, may leave the others waiting for the group's timeout.
    """
    options = options or LossOptions()
    rows = agree(batch, options, averaged=averaged, gather_dtype=gather_dtype, grad_dtype=grad_dtype)
    problem, weights = _problem(batch, options, rows, gather_dtype)
    losses, gradients = solve(problem, options, coefficient=weights, merge=_merge_columns)
    assert gradients is not None
    query_grad = gradients.query
    if gradients.peers is not None:
        query_grad = query_grad + scatter_row_sum(gradients.peers, counts=rows.queries)
    candidate_grad = scatter_row_sum(gradients.candidate, counts=rows.candidates)
    factor, dtype = world_size() if averaged else 1, grad_dtype or batch.query.dtype
    temperature_grad = all_sum(gradients.temperature) if averaged else gradients.temperature
    return InfoNCEResult(
        loss=all_sum((losses * weights).sum()),
        query_grad=(query_grad * factor).to(dtype),
        candidate_grad=(candidate_grad * factor).to(dtype),
        temperature_grad=temperature_grad,
    )


def _problem(
    batch: InfoNCEBatch, options: LossOptions, rows: Rows, gather_dtype: torch.dtype | None
) -> tuple[Problem, Tensor]:
    """This rank's queries against the candidates of all ranks, and its weights [n] over the sum of all ranks'."""
    n, rank = len(batch.query), dist.get_rank()
    index = torch.arange(n, device=batch.query.device)
    offset = sum(rows.candidates[:rank])
    candidates = _gather_rounded(batch.candidate, rows.candidates, gather_dtype)
    candidate_ids = None if batch.candidate_id is None else gather_rows(batch.candidate_id, counts=rows.candidates)
    peers = None
    if options.query_negatives:
        peer_ids = None if batch.query_id is None else gather_rows(batch.query_id, counts=rows.queries)
        peer_rows = _gather_rounded(batch.query, rows.queries, gather_dtype)
        peers = Peers(peer_rows, index + sum(rows.queries[:rank]), peer_ids)
    positive = (index if batch.positive is None else batch.positive) + offset
    joined = replace(batch, candidate=candidates, candidate_id=candidate_ids, positive=positive)
    own = range(offset, offset + len(batch.candidate))
    ones = batch.query.new_ones(n, dtype=work_dtype(batch.query.dtype))
    with refusing_together(ones):
        problem, weights = prepare(joined, options, peers=peers, own=own)
    return problem, share_of_all(ones if weights is None else weights)


def _gather_rounded(local: Tensor, counts: list[int], dtype: torch.dtype | None) -> Tensor:
    """The rows of all ranks in their own dtype, rounded to ``dtype`` before they travel."""
    if dtype is None or world_size() == 1:
        return gather_rows(local, counts=counts)
    return gather_rows(local.to(dtype), counts=counts).to(local.dtype)


def _merge_columns(columns: Columns) -> Columns:
    """The columns [M] over the queries of all ranks. Each column has its own query on one rank at most."""
    if world_size() == 1:
        return columns
    highest = columns.others.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest = highest.where(highest != -torch.inf, 0)  # a column without negatives
    own, share, power = all_sum(torch.stack([columns.own, columns.share, (columns.others - highest).exp()]))
    return Columns(highest + power.log(), own, share)
