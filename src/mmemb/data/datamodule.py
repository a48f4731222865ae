"""Sources to batches, for any Lightning trainer.

Training is one endless, numbered stream of batches (`mmemb.data.sampler`); a loader starts at the number of batches
that the trainer has trained, whatever workers had fetched ahead. So a run that was killed and resumed sees exactly the
batches of an uninterrupted one, in the middle of an epoch too. Loaders are plain iterables, not torch DataLoaders:
Lightning therefore puts no sampler of its own into them, and each rank's share is decided here.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, get_worker_info

from mmemb.data.records import Source, read_items, read_pairs, read_tasks
from mmemb.data.sampler import TaskBatchSampler, rows_by_task
from mmemb.types import EvaluationTask, Item, Pair

__all__ = ["Collate", "PairDataModule", "Source"]

Collate = Callable[[list[Pair], int], Any]
"""(pairs of a batch, seed) -> what the module trains on; runs in data-loader workers. Row r may use ``seed + r``: seeds
differ between the rows of a global batch, and do not depend on how many ranks share it."""


class PairDataModule(L.LightningDataModule):
    """Pairs for training, retrieval tasks for validation and test, items for predict.

    Args:
        train: sources of training pairs, mixed by their weights.
        validation: sources of retrieval tasks scored during training.
        test: sources of retrieval tasks scored at the end.
        predict: sources of items to embed: files of items or folders of pictures.
        batch_size: rows of one rank's batch.
        sub_batch_size: rows that share a task, so that in-batch negatives are of the query's own kind; divides
            `batch_size`.
        steps_per_epoch: batches of an epoch; by default as many as the training rows fill once.
        task_weights: how often each task is drawn, relative to the others; a task not named keeps the weight of its
            source, 0 leaves a task out.
        num_workers: processes that prepare training batches; 0 prepares them in the training process.
        seed: of the order of training rows, and of all that the collate function draws.
        bundled_seed: of the scenes that the bundled data composes.
    """

    def __init__(
        self,
        train: list[Source] | None = None,
        validation: list[Source] | None = None,
        test: list[Source] | None = None,
        predict: list[Source] | None = None,
        *,
        batch_size: int = 64,
        sub_batch_size: int = 16,
        steps_per_epoch: int | None = None,
        task_weights: dict[str, float] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        bundled_seed: int = 0,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer tasks than ranks
        self.sources: dict[str, list[Source]] = {
            "train": train or [],
            "validation": validation or [],
            "test": test or [],
            "predict": predict or [],
        }
        self.batch_size = batch_size
        self.sub_batch_size = sub_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.task_weights = task_weights
        self.num_workers = num_workers
        self.seed = seed
        self.bundled_seed = bundled_seed
        self._collate: Collate | None = None
        self._train: _TrainRows | None = None
        self._tasks: dict[str, list[EvaluationTask]] = {}
        self._items: list[Item] = []
        self._loader: _TrainLoader | None = None
        self._restored: dict[str, Any] = {"batches": 0}

    # -- what there is -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and checks the sources of a stage.

        Raises:
            FileNotFoundError: a file or picture does not exist.
            ValueError: the stage has no source, or a row is wrong.
        """
        if stage == "fit":
            self._train = self._train or _TrainRows(self._named("train"), self.bundled_seed)
            self._sampler()
            self.evaluation_tasks("validation")
        elif stage in ("validate", "test"):
            split = "validation" if stage == "validate" else "test"
            self._named(split)
            self.evaluation_tasks(split)
        elif stage == "predict":
            self._items = [item for source in self._named("predict") for item in self._read_items(source)]

    @property
    def train_pairs(self) -> Sequence[Pair]:
        """All training rows, after ``setup("fit")``."""
        if self._train is None:
            raise RuntimeError("the training pairs are read by setup('fit'); call it first")
        return self._train

    def evaluation_tasks(self, split: str) -> list[EvaluationTask]:
        """All retrieval tasks of ``validation`` or ``test`` (not only this rank's); empty where there is no source."""
        if split not in self._tasks:
            self._tasks[split] = [task for source in self.sources[split] for task in read_tasks(source)]
        return self._tasks[split]

    def use_collate(self, collate: Collate) -> None:
        """Sets what turns the pairs of a batch into the module's batch; until then loaders yield lists of pairs."""
        self._collate = collate

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> _TrainLoader:
        sampler, rows = self._sampler(), self.train_pairs
        if self._restored.get("stream", self._stream()) != self._stream():
            rank_zero_warn(
                "The checkpoint was trained on other data, seed or batch size: training goes on at the same batch "
                "number, but not with the batches of an uninterrupted run."
            )
        keep = _in_list if self.trainer is None else _in_box
        self._loader = _TrainLoader(
            lambda: _Batches(rows, sampler, self._collate or keep, self.seed),
            position=lambda: self.batches_trained,
            length=self.steps_per_epoch or -(-len(rows) // (self.batch_size * self._world()[1])),
            num_workers=self.num_workers,
        )
        return self._loader

    def val_dataloader(self) -> _Shard | list[Any]:
        tasks = self.evaluation_tasks("validation")
        return self._shard(tasks) if tasks else []  # the empty list is how Lightning is told that there is nothing

    def test_dataloader(self) -> _Shard:
        return self._shard(self.evaluation_tasks("test"))

    def predict_dataloader(self) -> _Shard:
        size = self.batch_size
        return self._shard([self._items[start : start + size] for start in range(0, len(self._items), size)])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves tensors; pairs, items and retrieval tasks have none and come through as they are."""
        if isinstance(batch, _Box):
            return batch.value
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Ends the workers of the training loader."""
        if stage == "fit" and self._loader is not None:
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers of the training loader."""
        self.teardown("fit")

    # -- resume ------------------------------------------------------------------------------------------------------

    @property
    def batches_trained(self) -> int:
        """Batches that the trainer has finished since the beginning of the run (over all epochs and resumes)."""
        if self.trainer is None:
            return int(self._restored["batches"])
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return int(progress.total.processed)

    def state_dict(self) -> dict[str, Any]:
        """How far the stream was trained, and what makes the stream what it is."""
        return {"batches": self.batches_trained, "stream": self._stream()} if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a stream; with a trainer the trainer's own restored progress says the position."""
        self._restored = state_dict or {"batches": 0}

    # -- details -----------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> list[Source]:
        if not self.sources[name]:
            raise ValueError(f"there is no {name} source; give data.{name} a list such as [{{path: pairs.jsonl}}]")
        return self.sources[name]

    def _read_items(self, source: Source) -> Sequence[Item]:
        if source.bundled is not None:
            return [pair.query for pair in read_pairs(source, seed=self.bundled_seed)]
        return read_items(source.path, image_root=source.image_root, limit=source.limit)

    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _sampler(self) -> TaskBatchSampler:
        assert self._train is not None
        rank, world_size = self._world()
        return TaskBatchSampler(
            self._train.rows,
            {**self._train.weights, **(self.task_weights or {})},
            batch_size=self.batch_size,
            sub_batch_size=self.sub_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _stream(self) -> dict[str, Any]:
        """All that decides the stream but the rows' content."""
        assert self._train is not None
        return {
            "rows": {task: len(rows) for task, rows in self._train.rows.items()},
            "weights": {**self._train.weights, **(self.task_weights or {})},
            "global_batch_size": self.batch_size * self._world()[1],
            "sub_batch_size": self.sub_batch_size,
            "seed": self.seed,
        }

    def _shard(self, values: Sequence[Any]) -> _Shard:
        rank, world_size = self._world()
        return _Shard(values[rank::world_size], boxed=self.trainer is not None)


class _TrainRows(Sequence[Pair]):
    """Pairs of several sources as one sequence, each source read once and never copied."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.weights: dict[str, float] = {}
        self.rows: dict[str, Sequence[int]] = {}
        self._parts = [read_pairs(source, seed=seed) for source in sources]
        self._starts: list[int] = []
        self._length = 0
        owners: dict[str, Source] = {}
        for source, pairs in zip(sources, self._parts, strict=True):
            if source.bundled == "pretrain":  # computed on access: nothing to list, and random in itself
                found: dict[str, Sequence[int]] = {"pretrain": range(self._length, self._length + len(pairs))}
            else:
                for pair in pairs:
                    if (owner := owners.setdefault(pair.id, source)) is not source:
                        raise ValueError(
                            f"{source.path}: the pair id {pair.id!r} stands in {owner.path} too; rationales are kept "
                            f"by id, so name each row once, or give rows ids of their own"
                        )
                found = dict(rows_by_task([pair.task for pair in pairs], offset=self._length))
            for task, rows in found.items():
                self.rows[task] = [*self.rows[task], *rows] if task in self.rows else rows
                self.weights[task] = self.weights.get(task, 0.0) + source.weight
            self._starts.append(self._length)
            self._length += len(pairs)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Pair:  # type: ignore[override]
        if not 0 <= row < self._length:
            raise IndexError(row)
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]]


class _Batches:
    """Map-style data set of whole batches by number; what workers hold."""

    def __init__(self, rows: Sequence[Pair], sampler: TaskBatchSampler, collate: Collate, seed: int) -> None:
        self.rows = rows
        self.sampler = sampler
        self.collate = collate
        self.seed = seed

    def __getitem__(self, index: int) -> Any:
        pairs = [self.rows[number] for number in self.sampler.batch(index)]
        try:
            return self.collate(pairs, self._seed(index) + self.sampler.rank * len(pairs))
        except (ValueError, FileNotFoundError) as error:
            if get_worker_info() is None:
                raise
            # Raised here it would reach the main process wrapped in a traceback of many lines.
            return _Failure(FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError, str(error))

    def _seed(self, index: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=6).digest(), "big")


class _Failure:
    """A user's mistake found while a batch was made, on its way to the main process."""

    def __init__(self, family: type[Exception], message: str) -> None:
        self.family = family
        self.message = message


class _Box:
    """Carries frozen dataclasses past the trainer's precision plugin, which refuses them; opened on transfer."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Window:
    """Batch numbers of the epoch at hand: the sampler of a DataLoader that outlives epochs (its workers persist)."""

    def __init__(self, length: int) -> None:
        self.start = 0
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.start + self.length))

    def __len__(self) -> int:
        return self.length


class _TrainLoader:
    """An epoch of batches from where the trainer stands; Lightning ends a resumed epoch where it should end."""

    def __init__(
        self, batches: Callable[[], _Batches], *, position: Callable[[], int], length: int, num_workers: int
    ) -> None:
        self._make = batches
        self._position = position
        self._window = _Window(length)
        self._num_workers = num_workers
        self._loader: DataLoader[Any] | None = None
        self._running: Any = None

    def __len__(self) -> int:
        return len(self._window)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing starts before the first batch is asked for, when progress is restored and collate is set.
        self._window.start = self._position()
        self._running = iter(self._open())
        for _ in range(len(self)):
            batch = next(self._running)
            if isinstance(batch, _Failure):
                raise batch.family(batch.message)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the position is the trainer's. Tells Lightning that the loader resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""

    def close(self) -> None:
        """Forgets the DataLoader and its iterator, which nothing else holds; workers end with them."""
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
                generator=torch.Generator(),  # its own: the global one must not depend on how often an epoch is entered
            )
        return self._loader


class _Shard:
    """This rank's share of something already in memory."""

    def __init__(self, values: Sequence[Any], *, boxed: bool) -> None:
        self._values = values
        self._boxed = boxed

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return (_Box(value) if self._boxed else value for value in self._values)


def _unchanged(batch: Any) -> Any:
    return batch


def _in_list(pairs: list[Pair], seed: int) -> list[Pair]:
    return pairs


def _in_box(pairs: list[Pair], seed: int) -> _Box:
    return _Box(pairs)
