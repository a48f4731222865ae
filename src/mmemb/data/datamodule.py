"""Turns sources into batches for any Lightning trainer.

Training data is one endless stream of numbered batches (`mmemb.data.sampler`). A loader starts at the number of batches
that the trainer has trained, even if data-loader workers have prepared further ones. So a run that was killed and
resumed sees exactly the batches of an uninterrupted run, even if it stopped in the middle of an epoch.

Loaders are plain iterables and not torch DataLoaders. Lightning therefore does not add a sampler of its own, and this
module decides which batches each rank gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from mmemb.common.checks import check_numbers
from mmemb.data.items import read_items
from mmemb.data.loaders import Batches, Box, Collate, InMemoryLoader, Streams, TrainLoader, TrainRows, in_box, in_list
from mmemb.data.pairs import read_pairs, read_tasks
from mmemb.data.sampler import TaskBatchSampler
from mmemb.data.sources import Source, Stream
from mmemb.types import EvaluationTask, Item, Pair

__all__ = ["Collate", "PairDataModule", "Source"]


_SPLITS = ("train", "validation", "test", "predict")


@dataclass(frozen=True)
class PhaseBatches:
    """The batches of a run that belong to a phase.

    Attributes:
        first: number of the phase's first batch within the run.
        stream: name of the stream that its pairs come from.
        collate: turns the pairs of a batch into the batch that the module trains on.
        reads_rationales: whether the phase trains its pairs with candidates of the rationale pool.
    """

    first: int
    stream: str
    collate: Collate
    reads_rationales: bool = False


class PairDataModule(L.LightningDataModule):
    """Loads pairs for training, retrieval tasks for validation and test, and items for predict.

    Args:
        train: sources of training pairs, mixed by their weights.
        validation: sources of the retrieval tasks that are scored during training.
        test: sources of the retrieval tasks that are scored at the end.
        predict: sources of items to embed: files of items or folders of pictures.
        streams: further training data by name, for phases that train on other pairs than ``train``.
        batch_size: rows per batch of one rank.
        sub_batch_size: rows that share a task, so that in-batch negatives are of the same kind as the query's positive.
            Must divide `batch_size`.
        steps_per_epoch: batches per epoch. By default, enough to cover the training rows once.
        task_weights: how often each task is drawn, relative to the others. A task that is not named keeps the weight of
            its source. 0 leaves a task out.
        num_workers: number of processes that prepare training batches. 0 prepares them in the training process.
        seed: seed of the order of training rows, and of all random choices of the collate function.
        bundled_seed: seed of the scenes that the bundled data composes.
    """

    def __init__(
        self,
        train: list[Source] | None = None,
        validation: list[Source] | None = None,
        test: list[Source] | None = None,
        predict: list[Source] | None = None,
        streams: dict[str, Stream] | None = None,
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
        check_numbers("data", at_least=0, num_workers=num_workers)
        check_numbers(
            "data", at_least=1, batch_size=batch_size, sub_batch_size=sub_batch_size, steps_per_epoch=steps_per_epoch
        )
        self.allow_zero_length_dataloader_with_multiple_devices = True  # predict may have fewer batches than ranks
        self.sources: dict[str, list[Source]] = {
            "train": train or [],
            "validation": validation or [],
            "test": test or [],
            "predict": predict or [],
        }
        for name, sources in self.sources.items():
            for source in sources:
                source.check(f"data.{name}")
        self.streams: dict[str, Stream] = {"train": Stream(train or [], batch_size, sub_batch_size, task_weights)}
        for name, stream in (streams or {}).items():
            if name in _SPLITS:
                raise ValueError(f"data.streams.{name}: this name belongs to data.{name}; give the stream another name")
            stream.check(f"data.streams.{name}")
            self.streams[name] = stream
            self.sources[name] = stream.sources
        self.batch_size = batch_size
        self.sub_batch_size = sub_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.bundled_seed = bundled_seed
        self._phases: list[PhaseBatches] = []
        self._rows: dict[str, TrainRows] = {}
        self._tasks: dict[str, list[EvaluationTask]] = {}
        self._items: list[Item] = []
        self._loader: TrainLoader | None = None
        self._restored: dict[str, Any] = {"batches": 0}

    # -- sources -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and checks the sources of a stage.

        Raises:
            FileNotFoundError: a file or picture does not exist.
            ValueError: the stage has no source, or a row is invalid.
        """
        if stage == "fit":
            self._named("train")
            for name, stream in self.streams.items():
                if stream.sources:
                    self.stream_pairs(name)
                    self._sampler(name)
            self.evaluation_tasks("validation")
        elif stage in ("validate", "test"):
            split = "validation" if stage == "validate" else "test"
            self._named(split)
            self.evaluation_tasks(split)
        elif stage == "predict":
            self._items = [item for source in self._named("predict") for item in self._read_items(source)]

    def stream_pairs(self, name: str) -> Sequence[Pair]:
        """Returns all pairs of a stream (``train`` or a name in ``streams``). Reads them once.

        Raises:
            ValueError: there is no such stream, or it has no source.
        """
        if name not in self._rows:
            self._rows[name] = TrainRows(self._named(name), self.bundled_seed)
        return self._rows[name]

    def evaluation_tasks(self, split: str) -> list[EvaluationTask]:
        """Returns all retrieval tasks of a split (``validation``, ``test``) or a stream, not only those of this rank.

        Empty if there is no source.

        Raises:
            ValueError: two sources have a task of the same name. Each query would be ranked against the candidates of
                one source only.
        """
        if split not in self._tasks:
            owners: dict[str, str] = {}
            found = []
            for source in self.sources[split]:
                for task in read_tasks(source):
                    if task.name in owners:
                        raise ValueError(
                            f"data.{split}: the task {task.name!r} is in {owners[task.name]} and in {source.path}, "
                            "but results are stored by task; give one task another name (task: ...), or join the files"
                        )
                    owners[task.name] = source.path
                    found.append(task)
            self._tasks[split] = found
        return self._tasks[split]

    def use_phases(self, phases: Sequence[PhaseBatches]) -> None:
        """Sets which stream each batch of the run comes from. Until then, loaders yield lists of pairs.

        Args:
            phases: the phases in order. The first one starts at batch 0.

        Raises:
            ValueError: a stream has no source.
        """
        for number, phase in enumerate(phases):
            rows = self.stream_pairs(phase.stream)
            earlier = {other.stream for other in phases[:number] if other.first < phase.first} - {phase.stream}
            shared = len(self._ids(phase.stream) & set().union(*map(self._ids, earlier))) if earlier else 0
            if shared:
                rank_zero_warn(
                    f"{shared} of the {len(rows)} pairs of {phase.stream!r} were trained on in an earlier phase. "
                    "A model that has memorised their answers does not learn when reasoning helps."
                )
        self._phases = list(phases)

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        if self._restored.get("stream", self._stream()) != self._stream():
            rank_zero_warn(
                "The checkpoint was trained with other data, another seed or another batch size. Training continues at "
                "the same batch number, but not with the batches of an uninterrupted run."
            )
        keep = in_list if self.trainer is None else in_box
        phases = self._phases or [PhaseBatches(0, "train", keep)]

        def streams() -> Streams:
            found = []
            for each in phases:
                sampler = self._sampler(each.stream)
                found.append((each.first, Batches(self._rows[each.stream], sampler, each.collate, self.seed)))
            return Streams(found)

        first = phases[0].stream
        rows = len(self.stream_pairs(first))
        self._loader = TrainLoader(
            streams,
            position=lambda: self.batches_trained,
            length=self.steps_per_epoch or -(-rows // (self.streams[first].batch_size * self._world()[1])),
            num_workers=self.num_workers,
        )
        return self._loader

    def val_dataloader(self) -> InMemoryLoader | list[Any]:
        tasks = self.evaluation_tasks("validation")
        return self._boxed(tasks) if tasks else []  # for Lightning, an empty list means no validation

    def test_dataloader(self) -> InMemoryLoader:
        return self._boxed(self.evaluation_tasks("test"))

    def predict_dataloader(self) -> InMemoryLoader:
        size = self.batch_size
        rank, world_size = self._world()
        batches = [self._items[start : start + size] for start in range(0, len(self._items), size)]
        return self._boxed(batches[rank::world_size])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves tensors to the device. Pairs, items and retrieval tasks have no tensors and pass unchanged."""
        if isinstance(batch, Box):
            return batch.value
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Ends the workers of the training loader."""
        if stage == "fit" and self._loader is not None:
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers of the training loader."""
        self.teardown("fit")

    def coming_pairs(self, batches: int) -> list[Pair]:
        """Returns the distinct pairs of this rank's next batches that train with rationales, in order.

        Args:
            batches: number of batches to look ahead. Batches of phases that read no rationales are left out.
        """
        now = self.batches_trained
        ends = [phase.first for phase in self._phases[1:]] + [now + batches]
        found: dict[tuple[str, int], None] = {}
        for phase, end in zip(self._phases, ends, strict=True):
            if phase.reads_rationales:
                sampler = self._sampler(phase.stream)
                for index in range(max(now, phase.first), min(now + batches, end)):
                    found |= dict.fromkeys((phase.stream, row) for row in sampler.batch(index - phase.first))
        return [self.stream_pairs(stream)[row] for stream, row in found]

    def restart(self) -> None:
        """Drops the prepared training batches. Call it when the data that the collate function reads has changed."""
        if self._loader is not None:
            self._loader.restart()

    # -- resume ------------------------------------------------------------------------------------------------------

    @property
    def batches_trained(self) -> int:
        """Number of batches that the trainer has finished since the run began, over all epochs and resumes."""
        if self.trainer is None:
            return int(self._restored["batches"])
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return int(progress.total.processed)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of trained batches, and the settings that determine the stream."""
        return {"batches": self.batches_trained, "stream": self._stream()} if self._rows else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position in the stream. With a trainer, the trainer's restored progress gives the position."""
        self._restored = state_dict or {"batches": 0}

    # -- details -----------------------------------------------------------------------------------------------------

    def _named(self, name: str) -> list[Source]:
        if not self.sources.get(name):
            place = f"data.{name}" if name in _SPLITS else f"data.streams.{name}.sources"
            raise ValueError(f"there is no {name} source; set {place} to a list such as [{{path: pairs.jsonl}}]")
        return self.sources[name]

    def _read_items(self, source: Source) -> Sequence[Item]:
        if source.bundled is not None:
            pairs = read_pairs(source, seed=self.bundled_seed)
            return [replace(pair.query, fields={**pair.query.fields, "id": pair.id}) for pair in pairs]
        return read_items(source.path, image_root=source.image_root, limit=source.limit)

    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _ids(self, name: str) -> set[str]:
        self.stream_pairs(name)
        return self._rows[name].listed_ids()

    def _sampler(self, name: str) -> TaskBatchSampler:
        self.stream_pairs(name)
        rows, stream = self._rows[name], self.streams[name]
        rank, world_size = self._world()
        return TaskBatchSampler(
            rows.rows,
            {**rows.weights, **(stream.task_weights or {})},
            batch_size=stream.batch_size,
            sub_batch_size=stream.sub_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _stream(self) -> list[dict[str, Any]]:
        """Returns what determines the order of the batches, per phase. The content of the rows is not part of it."""
        found = []
        for phase in self._phases or [PhaseBatches(0, "train", in_list)]:
            self.stream_pairs(phase.stream)
            rows, stream = self._rows[phase.stream], self.streams[phase.stream]
            found.append(
                {
                    "first": phase.first,
                    "rows": {task: len(numbers) for task, numbers in rows.rows.items()},
                    "weights": {**rows.weights, **(stream.task_weights or {})},
                    "global_batch_size": stream.batch_size * self._world()[1],
                    "sub_batch_size": stream.sub_batch_size,
                    "seed": self.seed,
                }
            )
        return found

    def _boxed(self, values: Sequence[Any]) -> InMemoryLoader:
        return InMemoryLoader(values, boxed=self.trainer is not None)
