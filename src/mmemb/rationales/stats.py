"""Statistics of a pool by task and worker: how many candidates help, and whether by their content or their format.

Cost: the candidates of every pair are read once, in order. The histograms need four bytes per score.
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
"""Task name of the rows that sum over all tasks."""


@dataclass
class GroupStats:
    """Candidates of one worker in one task.

    Attributes:
        task: the task.
        worker: the worker, with its model or a number if the pool has several workers of its kind.
        candidates: number of candidates, leaking ones included.
        leaks: number of leaking candidates. All further attributes are about the others.
        tokens: sum of the known lengths, in tokens.
        measured: number of candidates whose length is known.
        gains: raw gain of each scored candidate, in nats.
        placebos: gain of the placebo of each scored candidate, in nats. nan if there is none.
        kept: number of scored candidates whose gain exceeds the margin.
        format_alone: number of kept candidates whose placebo gains at least as much.
        compared: number of kept candidates that have a placebo.
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
        """Share of the scored candidates whose gain exceeds the margin. nan if none is scored."""
        return _share(self.kept, len(self.gains))

    @property
    def mean_gain(self) -> float:
        """Mean raw gain of the scored candidates, in nats."""
        return _share(math.fsum(self.gains), len(self.gains))

    @property
    def placebo_share(self) -> float:
        """Share of the kept candidates whose placebo gains at least as much: they may teach the format alone."""
        return _share(self.format_alone, self.compared)

    @property
    def mean_tokens(self) -> float:
        """Mean length in tokens, over the candidates whose length is known."""
        return _share(self.tokens, self.measured)

    def add(self, other: GroupStats) -> None:
        """Adds the counts and gains of another group to this one."""
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
    """Computes the statistics of each task and worker, sorted, and then of each worker over all tasks.

    The entries over all tasks have the task ``all``.

    Args:
        pool: the pool, opened with ``keep_leaks`` so that leaks are counted.
        pairs: the pairs to count. Pairs that the pool does not have are skipped.
        margin: a candidate counts as kept if its gain exceeds the margin, in nats.
        net_of_placebo: whether the margin applies to the net gain instead of the raw gain.
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
    """Returns suffixes that distinguish workers of one kind, by the digest of the worker's settings.

    A suffix is the model, or a number if there is no model, or both if several workers have the same model.

    Args:
        generation: settings as in the manifest. A worker that is the only one of its kind gets no suffix.
    """
    kinds: dict[str, dict[str, str]] = {}  # kind -> {digest of the settings, as stored in the rows: model}
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
