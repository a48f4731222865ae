"""Which rationales a pair trains on: a selector's choice, a pure function of the pool and a seed."""

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
    """What a pair trains on: the rationale (None: the direct path alone) and its loss weight."""

    rationale: Rationale | None
    weight: float


class CandidateSource(Protocol):
    """What a choice is made from: a pool, or a pool with what a run has added to it."""

    def candidates(self, pair_id: str) -> Candidates:
        """The candidates of a pair with their scores."""


def choose(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> Selected:
    """A pair's rationale for one epoch: ``(rationale or None, loss weight)``.

    Args:
        pool: candidates and scores.
        selector: chooses among them.
        pair_id: the pair.
        seed: of the epoch (and run); what differs by pair is added here, so the choice is the same on every rank.

    Raises:
        ValueError: the pool does not know the pair, or lacks scores that the selector needs.
    """
    candidates = pool.candidates(pair_id)
    selection = selector.select(candidates, seed=seed_of(seed, pair_id))
    chosen = None if selection.index is None else candidates.rationales[selection.index]
    return Selected(chosen, selection.weight)


def choose_many(pool: CandidateSource, selector: Selector, pair_id: str, seed: int) -> list[tuple[Rationale, float]]:
    """All rationales that a pair trains on in one epoch, with their weights; as `choose` otherwise."""
    candidates = pool.candidates(pair_id)
    selections = selector.select_many(candidates, seed=seed_of(seed, pair_id))
    return [(candidates.rationales[each.index], each.weight) for each in selections if each.index is not None]


def show(
    pair: Pair, pool: RationalePool, selector: Selector | None = None, *, seed: int = 0, console: Console | None = None
) -> None:
    """Prints a pair with its candidates, their gains and, if a selector is given, its choice for a seed.

    Args:
        pair: the pair.
        pool: opened with ``keep_leaks`` it shows leaking candidates too; the choice is made without them.
        selector: chooses; None shows no choice.
        seed: of the choice.
        console: where to print; None: the terminal.

    Raises:
        ValueError: as `choose`.
    """
    candidates = pool.candidates(pair.id)
    chosen = None
    if selector is not None:
        clean = [row for row, rationale in enumerate(candidates.rationales) if not rationale.leaks]
        selections = selector.select_many(_only(candidates, clean), seed=seed_of(seed, pair.id))
        chosen = [clean[each.index] for each in selections if each.index is not None]
    show_pair(pair, candidates, chosen, console=console)


def _only(candidates: Candidates, rows: Sequence[int]) -> Candidates:
    """Some of a pair's candidates."""
    scores, placebos = candidates.scores, candidates.scores_placebo
    return replace(
        candidates,
        rationales=tuple(candidates.rationales[row] for row in rows),
        scores=tuple(scores[row] for row in rows) if scores else (),
        scores_placebo=tuple(placebos[row] for row in rows) if placebos else (),
    )
