"""What a pool is worth, by task and worker: how many candidates, how many help, and whether it is their content.

Cost: every pair's candidates are read once, in order; four bytes a score are kept for the histograms.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmemb.common.digests import digest
from mmemb.rationales.gains import gains, placebo_gains
from mmemb.rationales.pool import RationalePool
from mmemb.types import Pair

ALL = "all"
"""Stands for every task in the rows that sum up."""


@dataclass
class GroupStats:
    """Candidates of one worker in one task.

    Attributes:
        task: the task.
        worker: the worker, with its model or a number where the pool has several of its kind.
        candidates: how many, leaking ones included.
        leaks: how many of them leak; all that follows is about the others.
        tokens: sum of their lengths, where known.
        measured: how many lengths are known.
        gains: raw gain of each scored candidate, in nats.
        placebos: gain of each one's placebo; nan where there was none.
        kept: how many of the scored exceed the margin.
        format_alone: how many of the kept have a placebo that gains at least as much.
        compared: how many of the kept have a placebo.
    """

    task: str
    worker: str
    candidates: int = 0
    leaks: int = 0
    tokens: int = 0
    measured: int = 0
    gains: array[float] = field(default_factory=lambda: array("f"))
    placebos: array[float] = field(default_factory=lambda: array("f"))
    kept: int = 0
    format_alone: int = 0
    compared: int = 0

    @property
    def keep_rate(self) -> float:
        """Share of the scored candidates whose gain exceeds the margin; nan where none is scored."""
        return _share(self.kept, len(self.gains))

    @property
    def mean_gain(self) -> float:
        """Mean raw gain in nats."""
        return _share(math.fsum(self.gains), len(self.gains))

    @property
    def placebo_share(self) -> float:
        """Share of the kept whose placebo gains at least as much: what they teach may be the format alone."""
        return _share(self.format_alone, self.compared)

    @property
    def mean_tokens(self) -> float:
        """Mean length of the candidates whose length is known."""
        return _share(self.tokens, self.measured)

    def add(self, other: GroupStats) -> None:
        """Takes in another group's candidates."""
        for name in ("candidates", "leaks", "tokens", "measured", "kept", "format_alone", "compared"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gains.extend(other.gains)
        self.placebos.extend(other.placebos)


def pool_stats(
    pool: RationalePool,
    pairs: Iterable[Pair],
    *,
    margin: float = 0.0,
    net_of_placebo: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[GroupStats]:
    """One entry a task and worker in sorted order, then one a worker over all tasks (task ``all``).

    Args:
        pool: opened with ``keep_leaks``, so that leaks are counted.
        pairs: those to look at; pairs that the pool lacks are passed over.
        margin: a candidate is kept whose gain exceeds it.
        net_of_placebo: the kept are counted by net instead of raw gain.
        advance: called with the number of pairs done since the last call.
    """
    groups: dict[tuple[str, str], GroupStats] = {}
    suffixes = worker_suffixes(pool.manifest.generation)
    for pair in pairs:
        if pair.id in pool:
            _add(groups, pool, pair, margin, net_of_placebo, suffixes)
        advance(1)
    found = [groups[key] for key in sorted(groups)]
    sums: dict[str, GroupStats] = {}
    for group in found:
        sums.setdefault(group.worker, GroupStats(ALL, group.worker)).add(group)
    return found + [sums[worker] for worker in sorted(sums)]


def worker_suffixes(generation: Mapping[str, Any]) -> dict[str, str]:
    """Digest of a worker's settings -> what tells it from others of its kind: its model, else a number, or both.

    Args:
        generation: as in the manifest. A worker that is the only one of its kind has no entry.
    """
    kinds: dict[str, dict[str, str]] = {}  # digest of the settings, as the rows have it -> model, by kind
    for entry in generation.get("workers", ()):
        model = entry.get("model") or entry.get("of", {}).get("model") or ""
        kinds.setdefault(entry["worker"], {})[digest(json.dumps(entry, sort_keys=True))] = model
    suffixes = {}
    for kind in kinds.values():
        models = list(kind.values())
        for number, (settings_hash, model) in enumerate(kind.items(), start=1):
            told = [model] if model else []
            told += [str(number)] if not model or models.count(model) > 1 else []
            if len(kind) > 1:
                suffixes[settings_hash] = f" ({', '.join(told)})"
    return suffixes


def _add(
    groups: dict[tuple[str, str], GroupStats],
    pool: RationalePool,
    pair: Pair,
    margin: float,
    net_of_placebo: bool,
    suffixes: Mapping[str, str],
) -> None:
    candidates = pool.candidates(pair.id)
    is_scored = bool(candidates.rationales) and not math.isnan(candidates.score_none)
    raw = gains(candidates) if is_scored else []
    by_rule = gains(candidates, net_of_placebo=True) if is_scored and net_of_placebo else raw
    placebos = placebo_gains(candidates) if is_scored else []
    settings = pool.settings_hashes(pair.id) if suffixes else ("",) * len(candidates.rationales)
    for number, rationale in enumerate(candidates.rationales):
        worker = rationale.worker + suffixes.get(settings[number], "")
        group = groups.setdefault((pair.task, worker), GroupStats(pair.task, worker))
        group.candidates += 1
        if rationale.leaks:
            group.leaks += 1
            continue
        group.tokens += rationale.tokens
        group.measured += rationale.tokens > 0
        if not is_scored:
            continue
        placebo = placebos[number] if placebos else math.nan
        group.gains.append(raw[number])
        group.placebos.append(placebo)
        if by_rule[number] > margin:
            group.kept += 1
            group.compared += not math.isnan(placebo)
            group.format_alone += placebo >= raw[number]


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
