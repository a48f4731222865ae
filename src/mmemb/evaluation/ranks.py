"""Splits work over ranks: each takes every world-size-th row, and every rank gets the whole result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from mmemb.types import Item

Value = TypeVar("Value")


def world() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(count: int) -> list[int]:
    """The rows that this rank works on."""
    return list(range(dist.get_rank() if world() > 1 else 0, count, world()))


def gather(value: Value) -> list[Value]:
    """Collects one value per rank, in the order of ranks, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sharded(items: Sequence[Item], encode: Callable[[list[Item]], Tensor]) -> Tensor:
    """Embeddings [M, D] of all items, where each item is encoded by one rank."""
    mine = share(len(items))
    return in_order(mine, encode([items[row] for row in mine]))


def in_order(mine: list[int], own: Tensor) -> Tensor:
    """Joins the rows [*, D] of all ranks in their original order."""
    shares = gather((mine, own))
    whole = own.new_empty(sum(len(rows) for rows, _ in shares), own.shape[1])
    for rows, part in shares:
        whole[rows] = part
    return whole
