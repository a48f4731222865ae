"""Computes the rows of a batch as a pure function of seed, batch number and rank.

The training order is one endless stream of sub-batches of one task each. A global batch is the next few sub-batches,
and each rank takes its share of them. It follows that:

- Any batch can be computed from its number, so a run resumes exactly.
- Ranks take different parts of the stream.
- One process with a batch of 64 sees the same rows as two processes with a batch of 32.

Cost: one permutation of a task's rows per pass over them, kept in memory while in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmemb.common.checks import check_numbers
from mmemb.common.digests import number_of

_BLOCK = 4096
"""Number of sub-batches whose tasks are drawn at once. The first jump to sub-batch n takes n / _BLOCK such draws."""


def rows_by_task(tasks: Sequence[str], *, offset: int = 0) -> dict[str, list[int]]:
    """Returns the row numbers of each task, for rows numbered from `offset`."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks, offset):
        rows.setdefault(task, []).append(row)
    return rows


class TaskBatchSampler:
    """Draws batches whose sub-batches have one task each.

    The task of a sub-batch is drawn by weight. Its rows are the next ones in the cycle of the task: every row once in
    shuffled order, then every row again in another order.

    Args:
        rows: task -> its row numbers. A `range` needs no shuffling: its rows are taken in order and never held in
            memory.
        weights: task -> its relative draw weight. The default is 1, and 0 leaves a task out. None draws all tasks
            equally often.
        batch_size: rows per batch of one rank.
        sub_batch_size: rows per sub-batch. Must divide `batch_size`.
        seed: seed of all draws.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: `sub_batch_size` does not divide `batch_size`, a weight is negative or for an unknown task, or no
            task is left.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[int]],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        sub_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 < sub_batch_size <= batch_size or batch_size % sub_batch_size:
            raise ValueError(
                f"sub_batch_size {sub_batch_size} must divide batch_size {batch_size}; "
                f"a batch consists of whole sub-batches of one task each"
            )
        self.rows = {task: rows[task] for task in sorted(rows) if len(rows[task])}
        self.weights = _normalised(list(self.rows), weights or {})
        self.sub_batch_size = sub_batch_size
        self.sub_batches = batch_size // sub_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._tasks = list(self.rows)
        self._before = [np.zeros(len(self._tasks), dtype=np.int64)]  # entry b: sub-batches of each task before block b
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._orders: dict[str, dict[int, np.ndarray]] = {task: {} for task in self._tasks}

    def batch(self, index: int) -> list[int]:
        """Returns the row numbers of this rank's batch number `index`, one sub-batch after the other."""
        return [row for _, rows in self.parts(index) for row in rows]

    def parts(self, index: int) -> Iterator[tuple[str, list[int]]]:
        """Yields (task, row numbers) of each sub-batch of batch number `index`."""
        first = (index * self.world_size + self.rank) * self.sub_batches
        for number in range(first, first + self.sub_batches):
            task, occurrence = self._locate(number)
            start = occurrence * self.sub_batch_size
            yield task, [self._row(task, place) for place in range(start, start + self.sub_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        index = 0
        while True:
            yield self.batch(index)
            index += 1

    def _locate(self, number: int) -> tuple[str, int]:
        """Returns the task of sub-batch `number`, and how many sub-batches of that task come before it."""
        block, place = divmod(number, _BLOCK)
        while len(self._before) <= block:
            drawn = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self._tasks)))
        drawn = self._draw(block)
        task = int(drawn[place])
        return self._tasks[task], int(self._before[block][task] + np.count_nonzero(drawn[:place] == task))

    def _draw(self, block: int) -> np.ndarray:
        """Returns the task numbers [_BLOCK] of a block's sub-batches."""
        if self._drawn[0] != block:
            generator = np.random.default_rng((self.seed, block))
            self._drawn = (block, generator.choice(len(self._tasks), size=_BLOCK, p=self.weights))
        return self._drawn[1]

    def _row(self, task: str, place: int) -> int:
        """Returns the row at a place in the endless sequence of a task."""
        rows = self.rows[task]
        turn, position = divmod(place, len(rows))
        if isinstance(rows, range):
            return rows[position]
        orders = self._orders[task]
        if turn not in orders:
            for old in [kept for kept in orders if abs(kept - turn) > 1]:
                del orders[old]
            generator = np.random.default_rng((self.seed, number_of(task), turn))
            orders[turn] = generator.permutation(len(rows))
        return rows[int(orders[turn][position])]


def _normalised(tasks: list[str], weights: Mapping[str, float]) -> np.ndarray:
    known = ", ".join(tasks) or "none"
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(f"task_weights has the task {task!r}, but no source has it; the tasks are {known}")
        check_numbers("task_weights", at_least=0, **{task: weight})
    values = np.array([float(weights.get(task, 1.0)) for task in tasks])
    if not values.sum() > 0:
        raise ValueError(f"no task is left to draw from (tasks: {known}); give at least one task a weight above 0")
    return values / values.sum()
