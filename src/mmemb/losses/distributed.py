"""Negatives across ranks: every rank scores its own queries against the candidates of all ranks.

    n, m this rank's queries and candidates   N, M those of all ranks, in rank order   D width   W ranks

Each rank computes n x M logits only. Candidates are all-gathered, candidate gradients summed and scattered back to
their owners. Row counts may differ between ranks (the last batch of an epoch): rows are padded to the largest count for
the collectives alone. Works on gloo and NCCL; without a process group, or with one rank, no collective runs.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmemb.kernels.checks import as_temperature, check_choices, check_form, prepare
from mmemb.kernels.engines import Engine, choose, solve
from mmemb.kernels.infonce import InfoNCEResult, infonce_with_grads
from mmemb.kernels.problem import Columns, Peers, work_dtype

ANOTHER_REFUSED = "another rank refused its input; its own message says why"

SAME_TEMPERATURE = 1e-3
"""Relative difference up to which temperatures count as the same: ranks that step alike may part by roundings."""


class _Form(NamedTuple):
    """What all ranks must have in common, beside the temperature."""

    device: str
    width: int
    dtype: torch.dtype
    ids: str
    margin: float | None
    query_negatives: bool
    candidate_negatives: bool
    hardness: float
    dims: list[int] | None
    symmetric: bool
    averaged: bool
    gather_dtype: torch.dtype | None
    engine: str


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(value: Tensor) -> Tensor:
    """The sum of a tensor of any shape over all ranks; the input is left as it is."""
    if world_size() == 1:
        return value
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def row_counts(rows: int, *, device: torch.device) -> list[int]:
    """Every rank's row count, in rank order."""
    if world_size() == 1:
        return [rows]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def gather_rows(local: Tensor, *, counts: list[int] | None = None) -> Tensor:
    """The rows of all ranks in rank order, without a graph.

    Args:
        local: [n, ...] of any dtype; n may differ between ranks, be 0 on some, the rest of the shape may not.
        counts: `row_counts` if known, which saves a collective.

    Returns:
        [N, ...].
    """
    if world_size() == 1:
        return local.detach()
    counts = row_counts(len(local), device=local.device) if counts is None else counts
    most = max(counts)
    padded = local.new_zeros(most, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = local.new_empty(most * len(counts), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([gathered[rank * most : rank * most + count] for rank, count in enumerate(counts)])


def scatter_row_sum(rows: Tensor, *, counts: list[int]) -> Tensor:
    """Sums [N, ...] over ranks and returns this rank's own rows [n, ...]: the reverse of `gather_rows`."""
    if world_size() == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros(len(counts), most, *rows.shape[1:])
    for rank, part in enumerate(rows.split(counts)):
        padded[rank, : len(part)] = part
    own = rows.new_empty(most, *rows.shape[1:])
    dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
    return own[: counts[dist.get_rank()]]


@torch.no_grad()
def distributed_infonce_with_grads(
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
    averaged: bool = True,
    gather_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    engine: Engine | None = None,
    grad_dtype: torch.dtype | None = None,
) -> InfoNCEResult:
    """The mean loss over the queries of all ranks, with its gradients for this rank's rows.

    Every rank must call it, with the same optional arguments; ``workspace_bytes``, ``grad_dtype`` and whether
    ``positive`` and ``weight`` are given may differ.

    Args:
        query: [n, D] this rank's queries; a rank may have none.
        candidate: [m, D] this rank's candidates; a rank may have none.
        temperature: the same on all ranks, up to `SAME_TEMPERATURE`.
        positive: [n] int64, rows of this rank's ``candidate``; default the diagonal.
        query_id: [n] int64, comparable across ranks.
        candidate_id: [m] int64.
        weight: [n]; the mean is sum(weight * loss) / sum(weight) over all ranks.
        margin: this, ``hardness``, ``dims``, ``symmetric``, ``workspace_bytes`` and ``engine`` as in
            `mmemb.kernels.infonce`.
        query_negatives: the other queries of all ranks are negatives of each query.
        candidate_negatives: the other candidates of all ranks are negatives of each query's positive.
        hardness: see ``margin``.
        dims: see ``margin``.
        symmetric: see ``margin``.
        averaged: the parameters' gradients will be averaged over ranks (DDP, FSDP), so the returned embedding gradients
            carry a factor W and the average is the single-process gradient of the whole batch. Otherwise no factor: the
            sum over ranks is.
        gather_dtype: what candidates (and queries that are negatives) are rounded to on their way between ranks, e.g.
            `torch.bfloat16` for half the bytes of float32; every rank then scores the rounded ones, its own included.
            None: as they are. Their gradients are not rounded to it. Without effect on one rank.
        workspace_bytes: see ``margin``.
        engine: see ``margin``.
        grad_dtype: see `mmemb.kernels.infonce_with_grads`.

    Returns:
        The global loss, equal on all ranks; gradients of this rank's rows [n, D] and [m, D]; the temperature's
        gradient: if averaged, the global one on every rank, otherwise this rank's share of it. The ranks' parts of a
        gradient travel and are summed in float32 (float64), and the sum alone is rounded.

    Raises:
        ValueError: as `mmemb.kernels.infonce`. What is wrong with the input of one rank is told there; the others say
            that a rank refused its own. Or device types, widths, dtypes, temperatures, engines or options differ
            between ranks; every rank names the first that does. A rank that fails later, in a collective or in the
            engine, may leave the others waiting for the group's timeout.
    """
    if world_size() == 1:
        check_choices(dtypes={"gather_dtype": gather_dtype}, averaged=averaged)
        return infonce_with_grads(
            query,
            candidate,
            temperature=temperature,
            positive=positive,
            query_id=query_id,
            candidate_id=candidate_id,
            weight=weight,
            margin=margin,
            query_negatives=query_negatives,
            candidate_negatives=candidate_negatives,
            hardness=hardness,
            dims=dims,
            symmetric=symmetric,
            workspace_bytes=workspace_bytes,
            engine=engine,
            grad_dtype=grad_dtype,
        )
    device = _device_of_group(query)
    try:
        check_choices(
            dtypes={"grad_dtype": grad_dtype, "gather_dtype": gather_dtype},
            averaged=averaged,
            query_negatives=query_negatives,
            candidate_negatives=candidate_negatives,
            symmetric=symmetric,
        )
        temperature = as_temperature(temperature)
        check_form(
            query,
            candidate,
            temperature,
            positive,
            query_id,
            candidate_id,
            weight,
            "mean",
            margin=margin,
            hardness=hardness,
            dims=dims,
            workspace_bytes=workspace_bytes,
            may_be_empty=("query", "candidate"),
        )
        if query.device.type not in (reached := _reached()):
            raise ValueError(f"query is on {query.device}; the process group serves {' and '.join(reached)} alone")
        value = float(temperature)
        if not 0 < value < math.inf:
            raise ValueError(f"temperature is {value}; allowed are finite numbers above 0")
        form = _Form(
            device=query.device.type,
            width=query.shape[1],
            dtype=query.dtype,
            ids="not given" if candidate_id is None else "given",
            margin=None if margin is None else float(margin),
            query_negatives=query_negatives,
            candidate_negatives=candidate_negatives,
            hardness=float(hardness),
            dims=None if dims is None else list(dims),
            symmetric=symmetric,
            averaged=averaged,
            gather_dtype=gather_dtype,
            engine=choose(query, engine=engine).__name__.rpartition("_")[2],
        )
    except Exception:
        _gathered([1, *[0] * (3 + len(_Form._fields))], device)  # the others wait in `_agree`
        raise
    n = len(query)
    query_counts, counts = _agree(form, value, queries=n, candidates=len(candidate), device=device)
    if positive is None:
        positive = torch.arange(n, device=query.device)
    offset = sum(counts[: dist.get_rank()])
    candidates = _gather_rounded(candidate, counts, gather_dtype)
    candidate_ids = None if candidate_id is None else gather_rows(candidate_id, counts=counts)
    peers = None
    if query_negatives:
        own = torch.arange(n, device=query.device) + sum(query_counts[: dist.get_rank()])
        peer_ids = None if query_id is None else gather_rows(query_id, counts=query_counts)
        peers = Peers(_gather_rounded(query, query_counts, gather_dtype), own, peer_ids)
    try:
        problem, weights = prepare(
            query,
            candidates,
            temperature,
            positive + offset,
            query_id,
            candidate_ids,
            weight,
            symmetric=symmetric,
            reduction="mean",
            margin=margin,
            peers=peers,
            candidate_negatives=candidate_negatives,
            hardness=hardness,
            dims=dims,
            workspace_bytes=workspace_bytes,
            own=range(offset, offset + len(candidate)),
        )
    except Exception:
        # The others wait for the sum of weights.
        all_sum(torch.full((), torch.nan, dtype=work_dtype(query.dtype), device=query.device))
        raise
    weights = _of_all_ranks(problem.scale.new_ones(n) if weights is None else weights)
    losses, gradients = solve(
        problem,
        coefficient=weights,
        symmetric=symmetric,
        merge=_merge_columns,
        workspace_bytes=workspace_bytes,
        engine=engine,
    )
    assert gradients is not None
    query_grad = gradients.query
    if gradients.peers is not None:
        query_grad = query_grad + scatter_row_sum(gradients.peers, counts=query_counts)
    candidate_grad = scatter_row_sum(gradients.candidate, counts=counts)
    factor = world_size() if averaged else 1
    temperature_grad = all_sum(gradients.temperature) if averaged else gradients.temperature
    return InfoNCEResult(
        loss=all_sum((losses * weights).sum()),
        query_grad=(query_grad * factor).to(grad_dtype or query.dtype),
        candidate_grad=(candidate_grad * factor).to(grad_dtype or query.dtype),
        temperature_grad=temperature_grad,
    )


def _device_of_group(query: object) -> torch.device:
    """Where the first collective finds what it sends: the CPU, if the group serves it, else the query's device.

    A rank whose query the group does not serve takes its current device of the first type that it does.
    """
    reached = _reached()
    if "cpu" in reached:
        return torch.device("cpu")
    if isinstance(query, Tensor) and query.device.type in reached:
        return query.device
    return torch.device(reached[0], torch.accelerator.current_device_index())


def _reached() -> list[str]:
    """The types of the devices that the group's backends serve."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]


def _gathered(numbers: list[int], device: torch.device) -> list[list[int]]:
    """Every rank's integers, as many of each, in rank order."""
    rows: list[list[int]] = gather_rows(torch.tensor([numbers], device=device), counts=[1] * world_size()).tolist()
    return rows


def _agree(
    form: _Form, temperature: float, *, queries: int, candidates: int, device: torch.device
) -> tuple[list[int], list[int]]:
    """Every rank's queries and candidates. One collective, the first of a call.

    Raises:
        ValueError: a rank gave up, or has another form or temperature; on every rank, or on every other.
    """
    (bits,) = struct.unpack("<q", struct.pack("<d", temperature))
    digests = [zlib.crc32(repr(value).encode()) for value in form]
    gave_up, all_queries, all_candidates, all_bits, *all_digests = (
        list(numbers) for numbers in zip(*_gathered([0, queries, candidates, bits, *digests], device), strict=True)
    )
    if any(gave_up):
        raise ValueError(ANOTHER_REFUSED)
    temperatures = [struct.unpack("<d", struct.pack("<q", each))[0] for each in all_bits]
    low, high = min(temperatures), max(temperatures)
    if not math.isclose(low, high, rel_tol=SAME_TEMPERATURE):  # of all, so that no rank goes on alone
        raise ValueError(
            f"temperature is {low} on rank {temperatures.index(low)} and {high} on rank {temperatures.index(high)}; "
            "all ranks need the same"
        )
    for (name, value), own, found in zip(form._asdict().items(), digests, all_digests, strict=True):
        hint = ", such as engine='tiled'" if name == "engine" else ""
        _check_same(name, value, [digest == own for digest in found], hint)
    return all_queries, all_candidates


def _check_same(name: str, value: object, same: list[bool], hint: str) -> None:
    """``same``: by rank, whether it has this rank's value."""
    others = [str(rank) for rank, equal in enumerate(same) if not equal]
    if others:
        ranks = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        raise ValueError(
            f"{name} is {value} on rank {dist.get_rank()} and not on rank {ranks}; all ranks need the same{hint}"
        )


def _of_all_ranks(weights: Tensor) -> Tensor:
    """This rank's weights over the sum of all ranks'.

    Raises:
        ValueError: that is 0; or not a number, as from a rank that refused its input.
    """
    total = all_sum(weights.sum())
    if total.isnan():
        raise ValueError(ANOTHER_REFUSED)
    if not total > 0:
        raise ValueError("the weights of all ranks' queries sum to 0; at least one query needs a weight above 0")
    return weights / total


def _gather_rounded(local: Tensor, counts: list[int], dtype: torch.dtype | None) -> Tensor:
    """The rows of all ranks in the dtype they had, rounded on the way if asked."""
    return gather_rows(local if dtype is None else local.to(dtype), counts=counts).to(local.dtype)


def _merge_columns(columns: Columns) -> Columns:
    """The columns [M] over the queries of all ranks; each column has its own query on one rank at most."""
    highest = columns.others.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest = highest.where(highest != -torch.inf, 0)  # a column without negatives
    own, share, power = all_sum(torch.stack([columns.own, columns.share, (columns.others - highest).exp()]))
    return Columns(highest + power.log(), own, share)
