"""Where a pair's rows lie, for pools of millions of pairs.

Costs 20 bytes a pair (the ids themselves stay on disk) and, to build, about a second a million pairs. A look-up is a
binary search. The arrays hold no Python objects: forked data-loader workers share their pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmemb.common.digests import number_of


class Run(NamedTuple):
    """Consecutive rows of one pair: part of the pool, first row in it, number of rows."""

    part: int
    first: int
    rows: int


class PairIndex:
    """Pair ids -> runs of rows, by a 64-bit hash: whoever reads a run compares the pair id that stands there.

    Args:
        runs: piece by piece: its part's number, and of its runs the pair ids, first rows and numbers of rows, in
            stored order.
    """

    def __init__(self, runs: Iterable[tuple[int, Iterable[str], NDArray[np.integer], NDArray[np.integer]]]) -> None:
        keys: list[NDArray[np.uint64]] = []
        part_of: list[NDArray[np.int32]] = []
        firsts: list[NDArray[np.int32]] = []
        counts: list[NDArray[np.int32]] = []
        for number, ids, first, count in runs:
            keys.append(np.fromiter((number_of(each) for each in ids), np.uint64, len(first)))
            part_of.append(np.full(len(first), number, np.int32))
            firsts.append(first.astype(np.int32))
            counts.append(count.astype(np.int32))
        unsorted = np.concatenate([np.empty(0, np.uint64), *keys])
        order = np.argsort(unsorted, kind="stable")  # runs of one pair stay in the order of the parts
        self._keys = unsorted[order]
        self._runs = [np.concatenate([np.empty(0, np.int32), *column])[order] for column in (part_of, firsts, counts)]
        self._pairs = int((self._keys[1:] != self._keys[:-1]).sum()) + (len(self._keys) > 0)

    def __len__(self) -> int:
        """Number of pairs."""
        return self._pairs

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self._keys.nbytes + sum(column.nbytes for column in self._runs)

    def runs(self, pair_id: str) -> list[Run]:
        """The runs that may be the pair's, in the order of the parts; empty where there is none."""
        key = np.uint64(number_of(pair_id))
        start, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        return [Run(*(int(column[at]) for column in self._runs)) for at in range(start, end)]
