"""Problems for the tests of the kernels, and the oracle in float64."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmemb.kernels import InfoNCEBatch, InfoNCEResult, LossOptions, infonce, infonce_with_grads, reference
from mmemb.kernels.problem import work_dtype

OPTIONS = (
    "positive",
    "weight",
    "ids",
    "margin",
    "query_negatives",
    "candidate_negatives",
    "hardness",
    "dims",
    "symmetric",
)
"""What can be asked for, in any combination; see `arguments`."""

SHAPES = [(1, 1, 1), (1, 7, 3), (7, 7, 1), (13, 31, 17), (2, 2, 384), (23, 29, 384), (67, 131, 13)]
"""One row, one column, primes, hard negatives (M > N), a width that is no power of two."""


def split(arguments: dict[str, Any]) -> tuple[LossOptions, dict[str, Any]]:
    """The options of the loss among the arguments, and the rest."""
    names = {field.name for field in fields(LossOptions)}
    options = {name: value for name, value in arguments.items() if name in names}
    return LossOptions(**options), {name: value for name, value in arguments.items() if name not in names}


def loss(query: Tensor, candidate: Tensor, **arguments: Any) -> Tensor:
    """`infonce` with the options written next to the other arguments, as the reference takes them."""
    options, rest = split(arguments)
    return infonce(query, candidate, options=options, **rest)


def grads(
    query: Tensor, candidate: Tensor, *, grad_dtype: torch.dtype | None = None, **arguments: Any
) -> InfoNCEResult:
    """`infonce_with_grads` likewise."""
    options, rest = split(arguments)
    return infonce_with_grads(InfoNCEBatch(query, candidate, **rest), options, grad_dtype=grad_dtype)


def unit_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random rows [rows, width] of length 1, but for rounding."""
    return normalize(torch.randn(rows, width, dtype=torch.float64), dim=1).to(dtype)


def arguments(options: frozenset[str] | set[str], shape: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments besides the embeddings and the temperature, with random values."""
    n, m, d = shape
    values: dict[str, dict[str, Any]] = {
        "positive": {"positive": torch.randperm(m)[:n]},
        "weight": {"weight": torch.rand(n) + 0.1},
        "ids": {"query_id": torch.randint(4, (n,)), "candidate_id": torch.randint(4, (m,))},
        "margin": {"margin": random.choice([-0.05, 0.1, 0.3])},
        "query_negatives": {"query_negatives": True},
        "candidate_negatives": {"candidate_negatives": True},
        "hardness": {"hardness": random.choice([1.0, 9.0])},
        "dims": {"dims": sorted({1 if d == 1 else max(2, d // 3), max(1, d // 2), d})},
        "symmetric": {"symmetric": True},
    }
    return {key: value for option in OPTIONS if option in options for key, value in values[option].items()}


def combinations(count: int) -> list[tuple[tuple[int, int, int], frozenset[str], float]]:
    """Random combinations of options, each with a shape and a temperature; every option alone and all of them first."""
    generator = random.Random(0)
    chosen = [frozenset(), *(frozenset([option]) for option in OPTIONS), frozenset(OPTIONS)]
    chosen += [frozenset(o for o in OPTIONS if generator.random() < 0.5) for _ in range(count - len(chosen))]
    return [
        (
            SHAPES[i % len(SHAPES)] if i >= len(OPTIONS) + 2 else (23, 31, 17),
            options,
            generator.choice([1.0, 0.05, 0.02, 0.01]),
        )
        for i, options in enumerate(chosen)
    ]


def oracle(query: Tensor, candidate: Tensor, temperature: float, **kwargs: Any) -> InfoNCEResult:
    """Loss and gradients by autograd through the full matrix in float64, for rows of length 1 if there is a margin."""
    if kwargs.get("margin") is not None:
        # What `Problem.limits` takes for rounding: of 100,000 pairs some lie within it.
        slack = max(8.0, query.shape[1] / 16) * torch.finfo(work_dtype(query.dtype)).eps
        kwargs["margin"] += slack
    leaves = [x.double().requires_grad_() for x in (query, candidate, torch.tensor(temperature))]
    value = reference.infonce(leaves[0], leaves[1], temperature=leaves[2], **kwargs)
    return InfoNCEResult(value.detach(), *torch.autograd.grad(value.sum(), leaves))


def error(given: Tensor, expected: Tensor, *, least: float = 1e-2) -> float:
    """Relative error in norm, absolute where the expected value is next to nothing."""
    return float((given.double() - expected).norm() / expected.norm().clamp_min(least))


def doubled(width: int) -> tuple[Tensor, Tensor]:
    """Queries and candidates [64, width], the second half of each a copy of the first."""
    query = unit_rows(32, width, torch.float32)
    candidate = normalize(query + 0.2 * unit_rows(32, width, torch.float32), dim=1)
    return torch.cat([query, query]), torch.cat([candidate, candidate])
