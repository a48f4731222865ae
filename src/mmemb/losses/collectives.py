"""Sums and rows over the ranks of the default process group.

    n rows of this rank   N rows of all ranks, in rank order   W ranks

Row counts may differ between ranks, as in the last batch of an epoch. Rows are padded to the largest count for the
collectives alone. Works with gloo and NCCL. Without a process group, or with one rank, no collective runs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(value: Tensor) -> Tensor:
    """Returns the sum of a tensor of any shape over all ranks. The input stays as it is."""
    if world_size() == 1:
        return value
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def row_counts(rows: int, *, device: torch.device) -> list[int]:
    """Returns every rank's row count, in rank order."""
    if world_size() == 1:
        return [rows]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def gather_rows(local: Tensor, *, counts: list[int] | None = None) -> Tensor:
    """Returns the rows of all ranks in rank order, without a graph.

    Args:
        local: [n, ...] of any dtype. n may differ between ranks and be 0 on some. The rest of the shape must be equal.
        counts: what `row_counts` returned, if known. This saves a collective.

    Returns:
        [N, ...].
    """
    if world_size() == 1:
        return local.detach()
    counts = row_counts(len(local), device=local.device) if counts is None else counts
    largest = max(counts)
    padded = local.new_zeros(largest, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = local.new_empty(largest * len(counts), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([gathered[rank * largest : rank * largest + count] for rank, count in enumerate(counts)])


def scatter_row_sum(rows: Tensor, *, counts: list[int]) -> Tensor:
    """Sums rows over ranks and returns this rank's part: the reverse of `gather_rows`.

    Args:
        rows: [N, ...], on every rank.
        counts: every rank's row count.

    Returns:
        [n, ...].
    """
    if world_size() == 1:
        return rows
    largest = max(counts)
    padded = rows.new_zeros(len(counts), largest, *rows.shape[1:])
    for rank, part in enumerate(rows.split(counts)):
        padded[rank, : len(part)] = part
    own = rows.new_empty(largest, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
    return own[: counts[dist.get_rank()]]
