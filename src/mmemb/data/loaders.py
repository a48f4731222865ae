"""Parts of a data module's loaders: rows of several sources, numbered batches, an endless training stream.

Loaders are plain iterables and not torch DataLoaders. Lightning therefore does not add a sampler of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch.utils.data import DataLoader, get_worker_info

from mmemb.common.digests import batch_seed
from mmemb.data.pairs import read_pairs
from mmemb.data.sampler import TaskBatchSampler, rows_by_task
from mmemb.data.sources import Source
from mmemb.types import Pair

Collate = Callable[[list[Pair], int], Any]
"""(pairs of a batch, seed) -> the batch that the module trains on. Runs in data-loader workers.

Row r may use the seed ``seed + r``. These seeds differ between the rows of a global batch. They do not depend on how
many ranks share the batch."""


class TrainRows(Sequence[Pair]):
    """Joins the pairs of several sources to one sequence. Each source is read once and not copied.

    Attributes:
        rows: task -> its row numbers.
        weights: task -> its draw weight: the sum of the weights of its sources.

    Raises:
        FileNotFoundError: for the same reasons as in `read_pairs`.
        ValueError: two sources have the same pair id, or for the same reasons as in `read_pairs`.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.weights: dict[str, float] = {}
        self.rows: dict[str, Sequence[int]] = {}
        self._parts = [read_pairs(source, seed=seed) for source in sources]
        self._computed = [source.bundled == "pretrain" for source in sources]
        self._starts: list[int] = []
        self._length = 0
        owners: dict[str, Source] = {}
        for source, pairs in zip(sources, self._parts, strict=True):
            stream = source.bundled == "pretrain"  # computed on access: rows are random already and have no listed ids
            for name in (source.path,) if stream else (pair.id for pair in pairs):
                if (owner := owners.setdefault(name, source)) is not source:
                    raise ValueError(
                        f"{source.path}: the pair id {name!r} is in {owner.path} too, but rationales are stored by id; "
                        f"list each row once, or give each row its own id"
                    )
            found: dict[str, Sequence[int]] = (
                {"pretrain": range(self._length, self._length + len(pairs))}
                if stream
                else dict(rows_by_task([pair.task for pair in pairs], offset=self._length))
            )
            for task, rows in found.items():
                self.rows[task] = [*self.rows[task], *rows] if task in self.rows else rows
                self.weights[task] = self.weights.get(task, 0.0) + source.weight
            self._starts.append(self._length)
            self._length += len(pairs)

    def listed_ids(self) -> set[str]:
        """Returns the ids of all pairs, without those of sources that are computed on access: these are random."""
        parts = zip(self._parts, self._computed, strict=True)
        return {pair.id for part, computed in parts if not computed for pair in part}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, row: int) -> Pair: ...
    @overload
    def __getitem__(self, row: slice) -> list[Pair]: ...
    def __getitem__(self, row: int | slice) -> Pair | list[Pair]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(self._length))]
        if not 0 <= row < self._length:
            raise IndexError(row)
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]]


class Batches:
    """Map-style data set of whole batches by number. Data-loader workers hold it."""

    def __init__(self, rows: Sequence[Pair], sampler: TaskBatchSampler, collate: Collate, seed: int) -> None:
        self.rows = rows
        self.sampler = sampler
        self.collate = collate
        self.seed = seed

    def __getitem__(self, index: int) -> Any:
        pairs = [self.rows[number] for number in self.sampler.batch(index)]
        try:
            return self.collate(pairs, batch_seed(self.seed, index) + self.sampler.rank * len(pairs))
        except (ValueError, FileNotFoundError) as error:
            if get_worker_info() is None:
                raise
            # If it were raised here, it would reach the main process inside a traceback of many lines.
            return Failure(FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError, str(error))


class Streams:
    """Joins streams of batches one after the other. Each stream has the number of its first batch."""

    def __init__(self, streams: Sequence[tuple[int, Batches]]) -> None:
        self.streams = streams

    def __getitem__(self, index: int) -> Any:
        start, batches = [stream for stream in self.streams if stream[0] <= index][-1]
        return batches[index - start]


class Failure:
    """Carries an error in the user's data from a data-loader worker to the main process."""

    def __init__(self, family: type[Exception], message: str) -> None:
        self.family = family
        self.message = message


class Box:
    """Hides a frozen dataclass from the trainer's precision plugin, which refuses it. Opened on transfer."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Window:
    """Samples the batch numbers of the current epoch, for a DataLoader whose workers persist over epochs."""

    def __init__(self, length: int) -> None:
        self.start = 0
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.start + self.length))

    def __len__(self) -> int:
        return self.length


class TrainLoader:
    """Yields an epoch of batches from the trainer's position on. Lightning ends a resumed epoch at its proper end."""

    def __init__(
        self, batches: Callable[[], Batches | Streams], *, position: Callable[[], int], length: int, num_workers: int
    ) -> None:
        self._make = batches
        self._position = position
        self._window = Window(length)
        self._num_workers = num_workers
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None

    def __len__(self) -> int:
        return len(self._window)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing starts before the first batch: by then progress is restored and collate is set.
        self._window.start = self._position()
        self._running = iter(self._open())
        for _ in range(len(self)):
            batch = next(self._running)
            if isinstance(batch, Failure):
                raise batch.family(batch.message)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, because the trainer has the position. Shows Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing, see `state_dict`."""

    def restart(self) -> None:
        """Starts again at the next batch, with new workers: the batches prepared by the old ones are out of date."""
        if self._running is not None:
            self._loader = None
            self._window.start = self._position()
            self._running = iter(self._open())

    def close(self) -> None:
        """Drops the DataLoader and its iterator. Nothing else refers to them, so their workers end."""
        self._loader = self._running = None

    def _open(self) -> DataLoader[Any]:
        if self._loader is None:
            self._loader = DataLoader(
                self._make(),  # type: ignore[arg-type]
                batch_size=None,
                sampler=self._window,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                persistent_workers=self._num_workers > 0,
                generator=torch.Generator(),  # its own: else each epoch would draw from the global one
            )
        return self._loader


class InMemoryLoader:
    """Yields values that are already in memory, one per step."""

    def __init__(self, values: Sequence[Any], *, boxed: bool) -> None:
        self._values = values
        self._boxed = boxed

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return (Box(value) if self._boxed else value for value in self._values)


def _unchanged(batch: Any) -> Any:
    return batch


def in_list(pairs: list[Pair], seed: int) -> list[Pair]:
    """Returns the pairs unchanged."""
    return pairs


def in_box(pairs: list[Pair], seed: int) -> Box:
    """Returns the pairs unchanged, in a `Box` for a trainer."""
    return Box(pairs)
