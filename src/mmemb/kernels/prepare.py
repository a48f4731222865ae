"""Turns a batch and the options into the engines' `Problem`, after the checks that need tensor values.

    N queries   M candidates   L peers   D width

All values that the checks read leave the device in one transfer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mmemb.kernels.options import InfoNCEBatch, LossOptions
from mmemb.kernels.problem import Peers, Problem, work_dtype


def prepare(
    batch: InfoNCEBatch, options: LossOptions, *, peers: Peers | None = None, own: range | None = None
) -> tuple[Problem, Tensor | None]:
    """Checks the values of a batch and returns its problem, and its weights in the work dtype.

    The shapes must have been checked before (`InfoNCEBatch.check`).

    Args:
        batch: the tensors; with several ranks, the candidates of all ranks.
        options: what the loss is computed with.
        peers: the queries that are negatives too. With ``query_negatives`` the default is the batch's queries.
        own: given if the queries are one rank's share. Then the positives are among these rows of ``candidate``, there
            may be no queries at all, and all weights may be 0.

    Raises:
        ValueError: a value is not allowed or not finite.
    """
    work, device = work_dtype(batch.query.dtype), batch.query.device
    temperature = batch.temperature_tensor()
    rows = torch.arange(len(batch.query), device=device)
    if peers is None and options.query_negatives:
        peers = Peers(batch.query, rows, batch.query_id)
    with torch.no_grad():
        weight = None if batch.weight is None else batch.weight.detach().to(work)
        problem = Problem(
            query=batch.query.detach(),
            candidate=batch.candidate.detach(),
            # In the work dtype before it moves: the temperature may be float64, which not every device has.
            scale=temperature.detach().to(work).to(device).reshape(()).reciprocal(),
            positive=rows if batch.positive is None else batch.positive,
            query_id=batch.query_id,
            candidate_id=batch.candidate_id,
            bound=math.inf,
            margin=options.margin,
            peers=None if peers is None else Peers(peers.query.detach(), peers.own, peers.id),
            candidate_negatives=options.candidate_negatives,
            hardness=options.hardness,
            dims=None if options.dims is None else tuple(options.dims),
        )
        values = _values(problem, weight, distinct=options.symmetric)
    allowed = range(len(batch.candidate)) if own is None else own
    _check_rows(values, problem, temperature)
    _check_per_query(values, rows=allowed, may_weigh_nothing=own is not None)
    return replace(problem, bound=_bound(values, problem)), weight


def _bound(values: dict[str, float], problem: Problem) -> float:
    """An upper bound of the absolute value of all logits.

    Raises:
        ValueError: logits could overflow.
    """
    scale = values["scale"] + problem.hardness
    names = ("query", "candidate", "peers")
    lengths = {name: 1.0 if problem.dims else values[name] for name in names if name in values}
    bound = scale * lengths.get("query", 0.0) * lengths["candidate"]
    if problem.peers is not None:
        bound = max(bound, scale * lengths.get("query", 0.0) * lengths.get("peers", 0.0))
    if problem.candidate_negatives:
        bound = max(bound, scale * lengths["candidate"] ** 2)
    maximum = torch.finfo(problem.work_dtype).max / 4
    if bound > maximum:
        raise ValueError(
            f"logits may reach {bound:.3g}, the longest rows' lengths times 1 / temperature + hardness; "
            f"allowed are {maximum:.3g} in {problem.work_dtype}"
        )
    return bound


def _values(problem: Problem, weight: Tensor | None, *, distinct: bool) -> dict[str, float]:
    """The values that shapes do not show, by name, in one transfer from the device."""
    work = problem.work_dtype
    floats: dict[str, Tensor] = {"scale": problem.scale}
    integers: dict[str, Tensor] = {}
    rows = {"query": problem.query, "candidate": problem.candidate}
    if problem.peers is not None:
        rows["peers"] = problem.peers.query
    for name, each in rows.items():
        if len(each) == 0:
            continue
        floats[name] = torch.linalg.vector_norm(each, dim=1, dtype=work).amax()
        if problem.dims is not None:
            prefix = each[:, : problem.dims[0]]
            floats[f"{name} prefix"] = torch.linalg.vector_norm(prefix, dim=1, dtype=work).amin()
    if len(problem.query):
        integers |= {"positive low": problem.positive.amin(), "positive high": problem.positive.amax()}
        if distinct:
            integers["repeated"] = (problem.positive.sort().values.diff() == 0).any()
        if weight is not None:
            floats |= {"weight low": weight.amin(), "weight sum": weight.sum()}
    # Floats travel as their bits, with integers that float32 could not hold: not every device has float64.
    bits = torch.int64 if work == torch.float64 else torch.int32
    packed = torch.stack(list(floats.values())).view(bits).long()
    if integers:
        packed = torch.cat([packed, torch.stack([each.long() for each in integers.values()])])
    packed = packed.cpu()
    numbers = packed[: len(floats)].to(bits).view(work).tolist() + packed[len(floats) :].tolist()
    return dict(zip([*floats, *integers], numbers, strict=True))


def _check_rows(values: dict[str, float], problem: Problem, temperature: Tensor) -> None:
    """Checks the embeddings' lengths and the temperature."""
    work, dims = problem.work_dtype, problem.dims
    for name in ("query", "candidate", "peers"):
        if not values.get(name, 0.0) < math.inf:
            raise ValueError(
                f"{name} has a row of norm {values[name]} in {work}; allowed are finite values, and finite sums of "
                "their squares"
            )
    if not 0 < values["scale"] < math.inf:
        raise ValueError(
            f"temperature is {temperature.item()}; allowed are finite numbers above 0 whose reciprocal is one too, "
            f"in {work}"
        )
    for name in ("query", "candidate", "peers"):
        # The square of the norm must be a normal number.
        if dims is not None and not values.get(f"{name} prefix", 1.0) > 1e-18:
            raise ValueError(
                f"{name} has a row whose first {dims[0]} values have norm {values[f'{name} prefix']}; with dims every "
                "prefix is normalised and needs a norm above 1e-18"
            )


def _check_per_query(values: dict[str, float], *, rows: range, may_weigh_nothing: bool) -> None:
    """Checks the positives and the weights."""
    low, high = values.get("positive low", rows.start), values.get("positive high", rows.start - 1)
    if low < rows.start or high >= rows.stop:
        raise ValueError(
            f"positive has values {low - rows.start:.0f} to {high - rows.start:.0f}; "
            f"allowed are rows of candidate, 0 to {len(rows) - 1}"
        )
    if values.get("repeated"):
        raise ValueError(
            "positive names a candidate twice; the symmetric loss needs a candidate of its own for every query"
        )
    low, total = values.get("weight low", 1.0), values.get("weight sum", 1.0)
    if not (low >= 0 and (total > 0 or may_weigh_nothing) and total < math.inf):
        raise ValueError(
            f"weight has minimum {low} and sum {total}; allowed are finite numbers of at least 0, not all 0"
        )
