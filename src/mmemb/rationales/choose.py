"""Chooses the rationales that each pair trains on: a pure function of selector, pool and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from rich.console import Console

from mmemb.common.digests import seed_of
from mmemb.interfaces import Selector
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.report import show_pair
from mmemb.types import Candidates, Pair, Rationale


class Selected(NamedTuple):
    """What a pair trains on: a rationale and its loss weight. None means the direct path alone."""

    rationale: Rationale | None
    weight: float


class CandidateSource(Protocol):
    """Gives the candidates of a pair: a pool, or a pool together with the candidates that a run has added."""

    def candidates(self, pair_id: str) -> Candidates:
        """Returns the candidates of a pair with their scores."""


def choose(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> Selected:
    """Chooses the rationale that a pair trains on in one epoch, and its loss weight.

    Args:
        pool: candidates and scores.
        selector: chooses among them.
        pair_id: the pair.
        seed: seed of the run and epoch. It is combined with the pair id, so every rank makes the same choice.

    Raises:
        ValueError: the pool does not have the pair, or lacks scores that the selector needs.
    """
    candidates = pool.candidates(pair_id)
    selection = selector.select(candidates, seed=seed_of(seed, pair_id))
    chosen = None if selection.index is None else candidates.rationales[selection.index]
    return Selected(chosen, selection.weight)


def choose_many(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> list[tuple[Rationale, float]]:
    """Chooses all rationales that a pair trains on in one epoch, with their loss weights. Otherwise like `choose`."""
    candidates = pool.candidates(pair_id)
    selections = selector.select_many(candidates, seed=seed_of(seed, pair_id))
    return [(candidates.rationales[each.index], each.weight) for each in selections if each.index is not None]


def show(
    pair: Pair, pool: RationalePool, selector: Selector | None = None, *, seed: int = 0, console: Console | None = None
) -> None:
    """Prints a pair, its candidates and their gains, and the choice of the selector if one is given.

    Args:
        pair: the pair.
        pool: the pool. Opened with ``keep_leaks``, it shows leaking candidates too. They are never chosen.
        selector: chooses among the candidates. None shows no choice.
        seed: seed of the choice.
        console: where to print. None means the terminal.

    Raises:
        ValueError: for the same reasons as in `choose`.
    """
    candidates = pool.candidates(pair.id)
    chosen = None
    if selector is not None:
        clean = [row for row, rationale in enumerate(candidates.rationales) if not rationale.leaks]
        selections = selector.select_many(_only(candidates, clean), seed=seed_of(seed, pair.id))
        chosen = [clean[each.index] for each in selections if each.index is not None]
    show_pair(pair, candidates, chosen, console=console)


def _only(candidates: Candidates, rows: Sequence[int]) -> Candidates:
    """Returns the candidates in the given rows only."""
    scores, placebos = candidates.scores, candidates.scores_placebo
    return replace(
        candidates,
        rationales=tuple(candidates.rationales[row] for row in rows),
        scores=tuple(scores[row] for row in rows) if scores else (),
        scores_placebo=tuple(placebos[row] for row in rows) if placebos else (),
    )
