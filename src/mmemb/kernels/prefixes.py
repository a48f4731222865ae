"""Matryoshka losses, one width at a time, for an engine without ``dims``.

N queries   M candidates   L peers   D width

The engine does its whole work once per width. The tiled engine needs none of this: it shares the products of all
widths. The engine gets the normalised prefixes in the work dtype. In 16 bits their rounding, divided by a low
temperature, would add an error to the loss that the inputs do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmemb.kernels.problem import Gradients, Peers, Problem

Solve = Callable[[Problem], tuple[Tensor, Gradients | None]]


def by_dimension(problem: Problem, solve: Solve) -> tuple[Tensor, Gradients | None]:
    """Returns the losses [N] and gradients of a problem with ``dims``, by solving one problem per width."""
    work = problem.work_dtype
    wide = {"query": problem.query, "candidate": problem.candidate}
    if problem.peers is not None:
        wide["peers"] = problem.peers.query
    sums = {name: torch.zeros_like(rows, dtype=work) for name, rows in wide.items()}
    losses, temperature = problem.scale.new_zeros(len(problem.query)), problem.scale.new_zeros(())
    found: Gradients | None = None
    for dim in problem.dims or ():
        # Not `normalize`, which divides by 1e-12 at least: the checks allow shorter prefixes.
        length = {
            name: torch.linalg.vector_norm(rows[:, :dim], dim=1, keepdim=True, dtype=work)
            for name, rows in wide.items()
        }
        unit = {name: rows[:, :dim].to(work) / length[name] for name, rows in wide.items()}
        peers = None if problem.peers is None else Peers(unit["peers"], problem.peers.own, problem.peers.id)
        part, found = solve(replace(problem, query=unit["query"], candidate=unit["candidate"], peers=peers, dims=None))
        losses += part
        if found is None:
            continue
        temperature += found.temperature
        for name, gradient in (("query", found.query), ("candidate", found.candidate), ("peers", found.peers)):
            if gradient is not None:
                along = (gradient * unit[name]).sum(1, keepdim=True)
                sums[name][:, :dim] += (gradient - along * unit[name]) / length[name]
    if found is None:
        return losses, None
    return losses, Gradients(sums["query"], sums["candidate"], temperature, sums.get("peers"))
