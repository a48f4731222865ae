"""The checks of `mmemb.kernels.infonce`'s input: `check_form` without looking at values, `prepare` with.

N queries   M candidates   L peers   D width
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor

from mmemb.kernels.problem import Peers, Problem, work_dtype

Reduction: TypeAlias = Literal["mean", "none"]

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""query, candidate, temperature, positive, query_id, candidate_id, weight"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_form(
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    positive: Tensor | None,
    query_id: Tensor | None,
    candidate_id: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    *,
    margin: float | None = None,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    workspace_bytes: int | None = None,
    may_be_empty: Sequence[str] = (),
) -> None:
    """Checks all that shapes, dtypes, devices and plain numbers show.

    Args:
        query: and the rest as in `mmemb.kernels.infonce`.
        may_be_empty: which of ``query`` and ``candidate`` may have no rows.

    Raises:
        ValueError: an argument is not what `mmemb.kernels.infonce` allows; the message names what was given and what is
            allowed.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; allowed are 'mean' and 'none'")
    rows = {"query": query, "candidate": candidate}
    integers = {"positive": positive, "query_id": query_id, "candidate_id": candidate_id}
    for name, tensor in {**rows, **integers, "weight": weight}.items():
        _check_plain(name, tensor)
    for name, tensor in rows.items():
        empty = len(tensor) == 0 and name not in may_be_empty if tensor.ndim else True
        if tensor.ndim != 2 or tensor.shape[1] == 0 or empty:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed is [rows, width] with at least one of each"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    n, m = len(query), len(candidate)
    if query.shape[1] != candidate.shape[1]:
        raise ValueError(f"query is {query.shape[1]} wide and candidate {candidate.shape[1]}; the widths must be equal")
    if query.dtype != candidate.dtype:
        raise ValueError(f"query is {query.dtype} and candidate {candidate.dtype}; the dtypes must be equal")
    _check_plain("temperature", temperature)
    if temperature.numel() != 1 or temperature.is_complex():
        raise ValueError(
            f"temperature is {temperature.dtype} of shape {tuple(temperature.shape)}; allowed is one real number"
        )
    if temperature.is_meta and not query.is_meta:
        raise ValueError(f"temperature is on {temperature.device}, where it has no value; query is on {query.device}")
    if positive is None and m < n:
        raise ValueError(
            f"{m} candidates for {n} queries; without positive= every query needs the candidate of its own row"
        )
    if (query_id is None) != (candidate_id is None):
        given, missing = ("query_id", "candidate_id") if candidate_id is None else ("candidate_id", "query_id")
        raise ValueError(f"{given} is given without {missing}; give both or neither")
    for name, ids in integers.items():
        size = m if name == "candidate_id" else n
        if ids is not None and (ids.shape != (size,) or ids.dtype != torch.int64):
            raise ValueError(
                f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; allowed is torch.int64 of shape ({size},)"
            )
    if weight is not None and (weight.shape != (n,) or not weight.is_floating_point()):
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; allowed is floating point of shape ({n},)"
        )
    for name, other in {"candidate": candidate, "weight": weight, **integers}.items():
        if other is not None and other.device != query.device:
            raise ValueError(f"{name} is on {other.device} and query on {query.device}; all must be on one device")
    if margin is not None and not (_is_number(margin) and math.isfinite(margin)):
        raise ValueError(f"margin is {margin}; allowed are finite numbers, and None to keep every negative")
    if not (_is_number(hardness) and 0 <= hardness < math.inf):
        raise ValueError(f"hardness is {hardness}; allowed are finite numbers of at least 0")
    if dims is not None:
        _check_dims(dims, query.shape[1])
    if workspace_bytes is not None and not (_is_integer(workspace_bytes) and workspace_bytes >= 1):
        raise ValueError(f"workspace_bytes is {workspace_bytes}; allowed are integers of at least 1, and None")


def as_temperature(temperature: Tensor | float) -> Tensor:
    """A tensor as it is; a number as one, 0-d float64 on the CPU, whatever the embeddings' device.

    Not every device knows float64.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(temperature, Tensor):
        return temperature
    if not _is_number(temperature):
        raise ValueError(f"temperature is a {type(temperature).__name__}; allowed is a number or a tensor of one")
    return torch.tensor(float(temperature), dtype=torch.float64, device="cpu")


def check_choices(*, dtypes: Mapping[str, torch.dtype | None] | None = None, **flags: bool) -> None:
    """Checks what chooses between ways to compute, or what is computed.

    Raises:
        ValueError: a flag is no bool, or a dtype is not floating point (or None, which leaves the input's).
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {flag!r}; allowed are True and False")
    for name, dtype in (dtypes or {}).items():
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} is {dtype!r}; allowed are floating point dtypes, and None for the input's")


def _check_plain(name: str, tensor: object) -> None:
    if tensor is None and name not in ("query", "candidate"):
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; allowed is a tensor, which torch.as_tensor makes")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; allowed is torch.strided, which its to_dense() gives")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    """Of numpy's numbers too."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_dims(dims: Sequence[int], width: int) -> None:
    whole = isinstance(dims, Sequence) and len(dims) > 0 and all(_is_integer(dim) for dim in dims)
    ascending = whole and all(a < b for a, b in zip(dims, dims[1:], strict=False))
    if not (ascending and dims[0] >= 1 and dims[-1] <= width):
        raise ValueError(f"dims is {dims!r}; allowed are ascending integers from 1 to the width {width}")


def prepare(
    query: Tensor,
    candidate: Tensor,
    temperature: Tensor,
    positive: Tensor | None,
    query_id: Tensor | None,
    candidate_id: Tensor | None,
    weight: Tensor | None,
    *,
    symmetric: bool,
    reduction: str,
    margin: float | None = None,
    peers: Peers | None = None,
    candidate_negatives: bool = False,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    workspace_bytes: int | None = None,
    own: range | None = None,
) -> tuple[Problem, Tensor | None]:
    """Checks the input of `mmemb.kernels.infonce` and returns it in the engines' form, and the weights.

    Args:
        query: and the rest as in `mmemb.kernels.infonce`.
        peers: the queries that are negatives too: these queries, or those of all ranks.
        own: the queries are one rank's share: their positives are among these rows of ``candidate``, there may be no
            queries at all, and all their weights may be 0.

    Raises:
        ValueError: as `check_form`, or a value is not allowed or not finite.
    """
    check_form(
        query,
        candidate,
        temperature,
        positive,
        query_id,
        candidate_id,
        weight,
        reduction,
        margin=margin,
        hardness=hardness,
        dims=dims,
        workspace_bytes=workspace_bytes,
        may_be_empty=() if own is None else ("query",),
    )
    work = work_dtype(query.dtype)
    with torch.no_grad():
        # In the work dtype before it moves: the temperature may be float64, which not every device knows.
        scale = temperature.detach().to(work).to(query.device).reshape(()).reciprocal()
        index = torch.arange(len(query), device=query.device) if positive is None else positive
        weight = None if weight is None else weight.detach().to(work)
        problem = Problem(
            query=query.detach(),
            candidate=candidate.detach(),
            scale=scale,
            positive=index,
            query_id=query_id,
            candidate_id=candidate_id,
            bound=math.inf,
            margin=margin,
            peers=None if peers is None else Peers(peers.query.detach(), peers.own, peers.id),
            candidate_negatives=candidate_negatives,
            hardness=hardness,
            dims=None if dims is None else tuple(dims),
        )
        values = _values(problem, weight, distinct=symmetric)
    rows = range(len(candidate)) if own is None else own
    _check_values(values, problem, temperature, rows=rows, may_weigh_nothing=own is not None)
    scale_value = values["scale"] + hardness
    lengths = {name: 1.0 if dims else values[name] for name in ("query", "candidate", "peers") if name in values}
    bound = scale_value * lengths.get("query", 0.0) * lengths["candidate"]
    if peers is not None:
        bound = max(bound, scale_value * lengths.get("query", 0.0) * lengths.get("peers", 0.0))
    if candidate_negatives:
        bound = max(bound, scale_value * lengths["candidate"] ** 2)
    most = torch.finfo(work).max / 4
    if bound > most:
        raise ValueError(
            f"logits may reach {bound:.3g}, the longest rows' lengths times 1 / temperature + hardness; "
            f"allowed are {most:.3g} in {work}"
        )
    return replace(problem, bound=bound), weight


def _values(problem: Problem, weight: Tensor | None, *, distinct: bool) -> dict[str, float]:
    """What shapes do not show; one transfer from the device in all."""
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
    # Floats travel as their bits, beside integers that float32 could not hold: not every device knows float64.
    bits = torch.int64 if work == torch.float64 else torch.int32
    packed = torch.stack(list(floats.values())).view(bits).long()
    if integers:
        packed = torch.cat([packed, torch.stack([each.long() for each in integers.values()])])
    packed = packed.cpu()
    numbers = packed[: len(floats)].to(bits).view(work).tolist() + packed[len(floats) :].tolist()
    return dict(zip([*floats, *integers], numbers, strict=True))


def _check_values(
    values: dict[str, float], problem: Problem, temperature: Tensor, *, rows: range, may_weigh_nothing: bool
) -> None:
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
        # Its square must be a normal number.
        if dims is not None and not values.get(f"{name} prefix", 1.0) > 1e-18:
            raise ValueError(
                f"{name} has a row whose first {dims[0]} values have norm {values[f'{name} prefix']}; with dims every "
                "prefix is normalised and needs a norm above 1e-18"
            )
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
