"""Finds the rows of a pair in a pool, for pools of millions of pairs.

The index takes 20 bytes per pair, because the ids stay on disk. Building it takes about one second per million pairs. A
look-up is a binary search. The arrays hold no Python objects, so forked data-loader workers share their memory pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmemb.common.digests import number_of


class Run(NamedTuple):
    """Consecutive rows of one pair: number of the part of the pool, first row in that part, number of rows."""

    part: int
    first: int
    rows: int


class PairIndex:
    """Maps pair ids to runs of rows by a 64-bit hash.

    Two ids may have the same hash, so the reader of a run must compare the pair id stored there.

    Args:
        runs: one entry per piece of a part: the part's number, then the pair id, first row and number of rows of each
            run, in stored order.
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
        order = np.argsort(unsorted, kind="stable")  # stable: runs of one pair stay in the order of the parts
        self._keys = unsorted[order]
        self._runs = [np.concatenate([np.empty(0, np.int32), *column])[order] for column in (part_of, firsts, counts)]
        self._pairs = int((self._keys[1:] != self._keys[:-1]).sum()) + (len(self._keys) > 0)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return self._pairs

    @property
    def nbytes(self) -> int:
        """Memory that the index takes, in bytes."""
        return self._keys.nbytes + sum(column.nbytes for column in self._runs)

    def runs(self, pair_id: str) -> list[Run]:
        """Returns the runs that may belong to the pair, in the order of the parts. Empty if there are none."""
        key = np.uint64(number_of(pair_id))
        start, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        return [Run(*(int(column[at]) for column in self._runs)) for at in range(start, end)]
