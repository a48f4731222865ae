"""Which engine solves a problem: Triton's on CUDA devices, the tiled one everywhere else.

An engine is a module with

    one_direction(problem, *, coefficient, workspace_bytes) -> (losses [N], Gradients or None)
    symmetric(problem, *, coefficient, merge, workspace_bytes) -> the same

An engine but the tiled one sees no ``dims``: it is called once for each of them.
What the Triton engine does not support, as its ``supports(query) -> bool`` says, goes to the tiled one; so does all
where its ``no_launch() -> str | None`` has a reason.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mmemb.kernels.prefixes import by_dimension
from mmemb.kernels.problem import Gradients, Merge, Problem

Engine: TypeAlias = Literal["triton", "tiled"]

TILED, TRITON = "mmemb.kernels.tiled.engine", "mmemb.kernels.triton.engine"

ENGINES: tuple[str, ...] = get_args(Engine)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_name(engine: str | None) -> None:
    """Refuses an engine that there is not.

    Raises:
        ValueError: as said.
    """
    if engine not in (None, *ENGINES):
        raise ValueError(f"engine is {engine!r}; allowed are {', '.join(map(repr, ENGINES))} and None, by device")


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """Once a process, not once a step."""
    warnings.warn(f"the loss takes the slower engine 'tiled': {reason}", stacklevel=3)


def choose(query: Tensor, *, engine: str | None = None) -> ModuleType:
    """The module that solves problems of such queries.

    Raises:
        ValueError: no such engine; or an engine was asked for that cannot solve them on this machine.
    """
    check_name(engine)
    tiled = import_module(TILED)
    if engine == "tiled" or (engine is None and query.device.type != "cuda"):
        return tiled
    try:
        triton = import_module(TRITON)
    except ImportError as error:
        if engine is None:
            return tiled
        raise ValueError(f"engine 'triton' cannot be loaded: {error}; install triton or leave engine out") from error
    if engine == "triton" and query.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"engine 'triton' needs a CUDA device and query is on {query.device}; "
            "leave engine out, or set TRITON_INTERPRET=1 before the start to run its interpreter"
        )
    if query.device.type == "cuda" and (reason := triton.no_launch()):
        if engine is None:
            _warn_of_fallback(reason)
            return tiled
        raise ValueError(f"engine 'triton' cannot launch kernels: {reason}; leave engine out to fall back to 'tiled'")
    if triton.supports(query):
        return triton
    if engine == "triton":
        raise ValueError(
            f"engine 'triton' does not support {query.dtype} there; leave engine out to fall back to 'tiled'"
        )
    return tiled


def solve(
    problem: Problem,
    *,
    coefficient: Tensor | None,
    symmetric: bool,
    merge: Merge | None = None,
    workspace_bytes: int | None = None,
    engine: str | None = None,
) -> tuple[Tensor, Gradients | None]:
    """Losses [N] and, if coefficients [N] are given, the gradients of sum(coefficient * loss).

    Args:
        problem: what to solve.
        coefficient: [N] in the work dtype, or None for the losses alone.
        symmetric: mean of both directions.
        merge: for the symmetric loss over several ranks, see `mmemb.kernels.problem.Columns`.
        workspace_bytes: most bytes of the engine's N x M buffers; None for the engine's own choice.
        engine: overrides the choice by device.

    Raises:
        ValueError: see `choose`.
    """
    module = choose(problem.query, engine=engine)

    def one(problem: Problem) -> tuple[Tensor, Gradients | None]:
        if symmetric:
            return module.symmetric(problem, coefficient=coefficient, merge=merge, workspace_bytes=workspace_bytes)
        return module.one_direction(problem, coefficient=coefficient, workspace_bytes=workspace_bytes)

    # Autocast would turn the products back into bfloat16.
    with torch.no_grad(), torch.autocast(problem.query.device.type, enabled=False):
        if problem.dims is not None and module is not import_module(TILED):
            return by_dimension(problem, one)
        return one(problem)
