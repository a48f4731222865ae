"""Chooses the engine that solves a problem: Triton's on CUDA devices, the tiled one everywhere else.

An engine is a module with two functions:

    one_direction(problem, *, coefficient, workspace_bytes) -> (losses [N], Gradients or None)
    symmetric(problem, *, coefficient, merge, workspace_bytes) -> the same

Only the tiled engine sees ``dims``. Any other engine is called once for each of them (`mmemb.kernels.prefixes`).
The tiled engine also takes over what the Triton engine does not support (its ``supports(query) -> bool``), and
everything on a machine that cannot launch kernels (its ``no_launch() -> str | None`` gives the reason).
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from mmemb.kernels.options import LossOptions
from mmemb.kernels.prefixes import by_dimension
from mmemb.kernels.problem import Gradients, Merge, Problem

TILED, TRITON = "mmemb.kernels.tiled.engine", "mmemb.kernels.triton.engine"


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    """Warns once per process, not once per step."""
    warnings.warn(f"the loss takes the slower engine 'tiled': {reason}", stacklevel=3)


def choose(query: Tensor, *, engine: str | None = None) -> ModuleType:
    """Returns the module that solves problems with such queries.

    Args:
        query: [N, D]; its device and dtype decide.
        engine: ``tiled``, ``triton``, or None for the choice by device.

    Raises:
        ValueError: the engine that was asked for cannot solve them on this machine.
    """
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
    problem: Problem, options: LossOptions, *, coefficient: Tensor | None, merge: Merge | None = None
) -> tuple[Tensor, Gradients | None]:
    """Returns the losses [N] and, if coefficients are given, the gradients of sum(coefficient * loss).

    Args:
        problem: what to solve.
        options: the engine, its workspace, and whether the loss is symmetric. The rest is in ``problem``.
        coefficient: [N] in the work dtype, or None for the losses alone.
        merge: for the symmetric loss over several ranks, see `mmemb.kernels.problem.Columns`.

    Raises:
        ValueError: see `choose`.
    """
    module = choose(problem.query, engine=options.engine)
    run = functools.partial(module.symmetric, merge=merge) if options.symmetric else module.one_direction
    run = functools.partial(run, coefficient=coefficient, workspace_bytes=options.workspace_bytes)
    # Autocast would turn the products back into bfloat16.
    with torch.no_grad(), torch.autocast(problem.query.device.type, enabled=False):
        if problem.dims is not None and module is not import_module(TILED):
            return by_dimension(problem, run)
        return run(problem)
