"""Finds the placebo of each candidate: a rationale of another pair of the same task, by the same worker.

A placebo reads like the candidate but says nothing about the pair, so its gain comes from the format alone. Workers of
one kind with different settings (two models, two sets of templates) count as two workers, because their texts read
differently.

Placebos come from a fixed set of donors. For each task and worker, the donors are the texts with the smallest hashes,
found in one pass over the pool. A candidate's placebo therefore does not depend on the shard, on the order of scoring,
or on a resume. Like the candidates that they replace, donors are rationales for a query. They do not leak their target.

Cost: one read of seven columns, and at most 64 texts per task and worker in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow.parquet as pq

from mmemb.common.digests import seed_of
from mmemb.types import Pair

_DONORS = 64
_COLUMNS = ["pair_id", "task", "side", "worker", "settings_hash", "text", "leaks"]

Group: TypeAlias = tuple[str, str, str]
"""Task, worker, and digest of the worker's settings. Donor and candidate have these in common."""


class Donor(NamedTuple):
    """A rationale that may serve as the placebo of another pair's candidate."""

    pair_id: str
    text: str


class Placebos:
    """Finds the placebo of a candidate.

    Args:
        donors: the donors of each group, in the order in which they are tried.
        positive_ids: donor's pair id -> its `positive_id`. A pair with the same target is no donor.
    """

    def __init__(self, donors: dict[Group, list[Donor]], positive_ids: dict[str, str]) -> None:
        self._donors = donors
        self._positive_ids = positive_ids

    @classmethod
    def collect(cls, shards: Iterable[Path], pairs: Sequence[Pair]) -> Placebos:
        """Reads the donors from a pool's candidates.

        Args:
            shards: Parquet files of candidates.
            pairs: the pairs of these candidates.
        """
        found: dict[Group, dict[str, tuple[int, str]]] = {}
        for path in shards:
            for row in pq.read_table(path, columns=_COLUMNS, use_threads=False).to_pylist():
                if row["text"] is None or row["side"] != "query" or row["leaks"]:
                    continue
                key = seed_of("placebo", row["pair_id"], row["text"])
                texts = found.setdefault((row["task"], row["worker"], row["settings_hash"]), {})
                if row["text"] not in texts or key < texts[row["text"]][0]:
                    texts[row["text"]] = key, row["pair_id"]
                if len(texts) >= 16 * _DONORS:
                    _keep_smallest(texts)
        for texts in found.values():
            _keep_smallest(texts)
        donors = {
            group: [Donor(pair_id, text) for text, (_, pair_id) in sorted(texts.items(), key=lambda each: each[1])]
            for group, texts in found.items()
        }
        wanted = {donor.pair_id for group in donors.values() for donor in group}
        return cls(donors, {pair.id: pair.positive_id for pair in pairs if pair.id in wanted})

    def of(self, pair: Pair, rows: Sequence[dict[str, Any]]) -> list[str | None]:
        """Returns a placebo for each candidate of a pair, or None if no other pair has one.

        Args:
            pair: the pair.
            rows: the candidates of the pair, with ``worker``, ``settings_hash`` and ``text``.
        """
        own = {row["text"] for row in rows}
        groups = [(pair.task, row["worker"], row["settings_hash"]) for row in rows]
        return [self._one(pair, group, number, own) for number, group in enumerate(groups)]

    def _one(self, pair: Pair, group: Group, number: int, own: set[str]) -> str | None:
        donors = self._donors.get(group, [])
        first = seed_of("placebo", pair.id, number) % max(1, len(donors))
        for donor in donors[first:] + donors[:first]:
            same_pair = donor.pair_id == pair.id or self._positive_ids.get(donor.pair_id) == pair.positive_id
            if not same_pair and donor.text not in own:
                return donor.text
        return None


def _keep_smallest(texts: dict[str, tuple[int, str]]) -> None:
    """Removes all but the `_DONORS` texts with the smallest keys."""
    kept = {text for _, text in heapq.nsmallest(_DONORS, ((key, text) for text, key in texts.items()))}
    for text in texts.keys() - kept:
        del texts[text]
