"""What all ranks must have in common before the loss runs across ranks, and how every rank learns of a refusal.

    n, m this rank's queries and candidates   D width

A rank that raises alone would leave the others waiting in a collective until the group's timeout. So each rank sends
whether it refuses its own input, its row counts, its temperature, and a digest of each term. One collective does it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmemb.kernels.checks import check_choices
from mmemb.kernels.engines import choose
from mmemb.kernels.options import InfoNCEBatch, LossOptions
from mmemb.losses.collectives import all_sum, gather_rows, world_size

ANOTHER_REFUSED = "another rank refused its input; its own message says why"

SAME_TEMPERATURE = 1e-3
"""Relative difference up to which temperatures count as equal: ranks that take equal steps may differ by rounding."""

OPTIONS = tuple(field.name for field in fields(LossOptions) if field.name not in ("engine", "workspace_bytes"))

TERMS = ("device", "width", "dtype", "ids", *OPTIONS, "averaged", "gather_dtype", "engine")
"""What all ranks must have in common, besides the temperature. A rank's workspace is its own matter."""


class Rows(NamedTuple):
    """Every rank's row counts, in rank order.

    Attributes:
        queries: [W] numbers of queries.
        candidates: [W] numbers of candidates.
    """

    queries: list[int]
    candidates: list[int]


def agree(
    batch: InfoNCEBatch,
    options: LossOptions,
    *,
    averaged: bool,
    gather_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
) -> Rows:
    """Checks this rank's input and that all ranks ask for the same, and returns every rank's row counts.

    Every rank must call it. It is the first collective of a loss, and the only one that checks need.

    Args:
        batch: this rank's rows [n, D] and [m, D]; a rank may have none.
        options: must be equal on all ranks, except for ``workspace_bytes``.
        averaged: must be equal on all ranks, and so must ``gather_dtype``.
        gather_dtype: the dtype in which rows travel.
        grad_dtype: the dtype of the gradients; may differ.

    Raises:
        ValueError: this rank's input is not allowed; or another rank refused its own; or something differs between
            ranks. Then every rank names the first thing that does.
    """
    device = device_of_group(batch.query)
    try:
        check_choices(dtypes={"grad_dtype": grad_dtype, "gather_dtype": gather_dtype}, averaged=averaged)
        temperature = _checked(batch, options)
        terms = _terms(batch, options) | {"averaged": averaged, "gather_dtype": gather_dtype}
    except Exception:
        _gather_integers([1, *[0] * (3 + len(TERMS))], device)  # the other ranks wait for it below
        raise
    digests = [zlib.crc32(repr(terms[name]).encode()) for name in TERMS]
    own = [0, len(batch.query), len(batch.candidate), _as_bits(temperature), *digests]
    gave_up, queries, candidates, bits, *found = (
        list(each) for each in zip(*_gather_integers(own, device), strict=True)
    )
    if any(gave_up):
        raise ValueError(ANOTHER_REFUSED)
    _check_temperatures([_from_bits(each) for each in bits])
    for name, digest, theirs in zip(TERMS, digests, found, strict=True):
        _check_same(name, terms[name], [each == digest for each in theirs])
    if not any(candidates):
        raise ValueError("no rank has a candidate; at least one rank needs one")
    return Rows(queries, candidates)


@contextmanager
def refusing_together(like: Tensor) -> Iterator[None]:
    """A context for checks between `agree` and `share_of_all`: if they fail, the other ranks' `share_of_all` raises.

    Args:
        like: a tensor with the device and the dtype of the weights.
    """
    try:
        yield
    except Exception:
        all_sum(like.new_full((), torch.nan))  # the other ranks wait for the sum of weights
        raise


def share_of_all(weights: Tensor) -> Tensor:
    """Returns this rank's weights [n], divided by the sum of all ranks' weights.

    Raises:
        ValueError: the sum is 0; or it is not a number, because a rank refused its input.
    """
    total = all_sum(weights.sum())
    if total.isnan():
        raise ValueError(ANOTHER_REFUSED)
    if not total > 0:
        raise ValueError("the weights of all ranks' queries sum to 0; at least one query needs a weight above 0")
    return weights / total


def device_of_group(query: object) -> torch.device:
    """Returns the device for the first collective's tensors.

    It is the CPU if the group serves the CPU, otherwise the query's device. If the group does not serve that either, it
    is this rank's current device of the first type that the group serves.
    """
    served = _served()
    if "cpu" in served:
        return torch.device("cpu")
    if isinstance(query, Tensor) and query.device.type in served:
        return query.device
    return torch.device(served[0], torch.accelerator.current_device_index())


def _served() -> list[str]:
    """The device types that the group's backends serve."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]


def _checked(batch: InfoNCEBatch, options: LossOptions) -> float:
    """Checks a rank's batch and returns its temperature."""
    batch.check(options, may_be_empty=("query", "candidate"))
    if batch.query.device.type not in (served := _served()):
        raise ValueError(f"query is on {batch.query.device}; the process group serves {' and '.join(served)} alone")
    temperature = float(batch.temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; allowed are finite numbers above 0")
    return temperature


def _terms(batch: InfoNCEBatch, options: LossOptions) -> dict[str, Any]:
    """This rank's `TERMS` by name, all but those of the call itself."""
    return {name: getattr(options, name) for name in OPTIONS} | {
        "device": batch.query.device.type,
        "width": batch.query.shape[1],
        "dtype": batch.query.dtype,
        "ids": "not given" if batch.candidate_id is None else "given",
        "engine": choose(batch.query, engine=options.engine).__name__.split(".")[-2],
    }


def _gather_integers(own: list[int], device: torch.device) -> list[list[int]]:
    """Every rank's integers, in rank order. All ranks give equally many."""
    rows: list[list[int]] = gather_rows(torch.tensor([own], device=device), counts=[1] * world_size()).tolist()
    return rows


def _as_bits(value: float) -> int:
    """The 64 bits of a float as an integer, which no device rounds."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _from_bits(bits: int) -> float:
    """The reverse of `_as_bits`."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _check_temperatures(temperatures: list[float]) -> None:
    """Compares the lowest and the highest of all ranks, so that either all ranks raise or none does."""
    low, high = min(temperatures), max(temperatures)
    if not math.isclose(low, high, rel_tol=SAME_TEMPERATURE):
        raise ValueError(
            f"temperature is {low} on rank {temperatures.index(low)} and {high} on rank {temperatures.index(high)}; "
            "all ranks need the same"
        )


def _check_same(name: str, value: object, same: list[bool]) -> None:
    """Raises if ``same``, which says for each rank whether it has this rank's value, is not true throughout."""
    others = [str(rank) for rank, equal in enumerate(same) if not equal]
    if others:
        ranks = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        hint = ", such as engine='tiled'" if name == "engine" else ""
        raise ValueError(
            f"{name} is {value} on rank {dist.get_rank()} and not on rank {ranks}; all ranks need the same{hint}"
        )
