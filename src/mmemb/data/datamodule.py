"""Sources to batches, for any Lightning trainer.

Training is one endless, numbered stream of batches (`mmemb.data.sampler`); a loader starts at the number of batches
that the trainer has trained, whatever workers had fetched ahead. So a run that was killed and resumed sees exactly the
batches of an uninterrupted one, in the middle of an epoch too. Loaders are plain iterables, not torch DataLoaders:
Lightning therefore puts no sampler of its own into them, and each rank's share is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from mmemb.common.checks import check_numbers
from mmemb.data.items import read_items
from mmemb.data.loaders import Batches, Box, Collate, Shard, Streams, TrainLoader, TrainRows, in_box, in_list
from mmemb.data.pairs import read_pairs, read_tasks
from mmemb.data.sampler import TaskBatchSampler
from mmemb.data.sources import Source
from mmemb.types import EvaluationTask, Item, Pair

__all__ = ["Collate", "PairDataModule", "Source"]


class PairDataModule(L.LightningDataModule):
    """Pairs for training, retrieval tasks for validation and test, items for predict.

    Args:
        train: sources of training pairs, mixed by their weights.
        validation: sources of retrieval tasks scored during training.
        test: sources of retrieval tasks scored at the end.
        predict: sources of items to embed: files of items or folders of pictures.
        control: sources of the control phase's pairs, which the phase before should not have seen.
        batch_size: rows of one rank's batch.
        sub_batch_size: rows that share a task, so that in-batch negatives are of the query's own kind; divides
            `batch_size`.
        steps_per_epoch: batches of an epoch; by default as many as the training rows fill once.
        task_weights: how often each task is drawn, relative to the others; a task not named keeps the weight of its
            source, 0 leaves a task out.
        num_workers: processes that prepare training batches; 0 prepares them in the training process.
        control_batch_size: queries of one rank's batch in the control phase.
        control_sub_batch_size: rows of it that share a task; divides it.
        seed: of the order of training rows, and of all that the collate function draws.
        bundled_seed: of the scenes that the bundled data composes.
    """

    def __init__(
        self,
        train: list[Source] | None = None,
        validation: list[Source] | None = None,
        test: list[Source] | None = None,
        predict: list[Source] | None = None,
        control: list[Source] | None = None,
        *,
        batch_size: int = 64,
        sub_batch_size: int = 16,
        steps_per_epoch: int | None = None,
        task_weights: dict[str, float] | None = None,
        num_workers: int = 0,
        control_batch_size: int = 32,
        control_sub_batch_size: int = 8,
        seed: int = 0,
        bundled_seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers("data", at_least=0, num_workers=num_workers)
        check_numbers(
            "data", at_least=1, batch_size=batch_size, sub_batch_size=sub_batch_size, steps_per_epoch=steps_per_epoch
        )
        check_numbers(
            "data", at_least=1, control_batch_size=control_batch_size, control_sub_batch_size=control_sub_batch_size
        )
        self.allow_zero_length_dataloader_with_multiple_devices = True  # predict may have fewer batches than ranks
        self.sources: dict[str, list[Source]] = {
            "train": train or [],
            "validation": validation or [],
            "test": test or [],
            "predict": predict or [],
            "control": control or [],
        }
        for name, sources in self.sources.items():
            for source in sources:
                source.check(f"data.{name}")
        self.batch_size = batch_size
        self.sub_batch_size = sub_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.task_weights = task_weights
        self.num_workers = num_workers
        self.control_batch_size = control_batch_size
        self.control_sub_batch_size = control_sub_batch_size
        self.seed = seed
        self.bundled_seed = bundled_seed
        self._collate: Collate | None = None
        self._train: TrainRows | None = None
        self._control: TrainRows | None = None
        self._control_collate: Collate | None = None
        self._control_start = 0
        self._tasks: dict[str, list[EvaluationTask]] = {}
        self._items: list[Item] = []
        self._loader: TrainLoader | None = None
        self._restored: dict[str, Any] = {"batches": 0}

    # -- what there is -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and checks the sources of a stage.

        Raises:
            FileNotFoundError: a file or picture does not exist.
            ValueError: the stage has no source, or a row is wrong.
        """
        if stage == "fit":
            self._train = self._train or TrainRows(self._named("train"), self.bundled_seed)
            self._sampler()
            if self.sources["control"]:
                self._control = self._control or TrainRows(self.sources["control"], self.bundled_seed)
                self._control_sampler()
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
        """All retrieval tasks of a split (``validation``, ``test``, ``control`` or ``train``), not only this rank's.

        Empty where there is no source.

        Raises:
            ValueError: two sources have a task of one name: its queries would be ranked against half of the candidates.
        """
        if split not in self._tasks:
            owners: dict[str, str] = {}
            found = []
            for source in self.sources[split]:
                for task in read_tasks(source):
                    if task.name in owners:
                        raise ValueError(
                            f"data.{split}: the task {task.name!r} stands in {owners[task.name]} and in {source.path}, "
                            "and results are kept by task; give one another name (task: ...), or join the files"
                        )
                    owners[task.name] = source.path
                    found.append(task)
            self._tasks[split] = found
        return self._tasks[split]

    def use_collate(self, collate: Collate) -> None:
        """Sets what turns the pairs of a batch into the module's batch; until then loaders yield lists of pairs."""
        self._collate = collate

    def use_control(self, collate: Collate, *, start: int) -> None:
        """From batch number ``start`` on, training batches come from ``control``, by a collate function of their own.

        Raises:
            ValueError: there is no control source.
        """
        self._named("control")
        assert self._control is not None
        shared = {pair.id for pair in self._control} & {pair.id for pair in self.train_pairs} if start else set()
        if shared:
            rank_zero_warn(
                f"{len(shared)} of the {len(self._control)} control pairs are training pairs too: a model that has "
                "memorised their answers finds nothing to think about."
            )
        self._control_collate, self._control_start = collate, start

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        sampler, rows = self._sampler(), self.train_pairs
        if self._restored.get("stream", self._stream()) != self._stream():
            rank_zero_warn(
                "The checkpoint was trained on other data, seed or batch size: training goes on at the same batch "
                "number, but not with the batches of an uninterrupted run."
            )
        keep = in_list if self.trainer is None else in_box

        def streams() -> Streams:
            found = [(0, Batches(rows, sampler, self._collate or keep, self.seed))]
            if self._control is not None and self._control_collate is not None:
                control = Batches(self._control, self._control_sampler(), self._control_collate, self.seed)
                found.append((self._control_start, control))
            return Streams(found)

        self._loader = TrainLoader(
            streams,
            position=lambda: self.batches_trained,
            length=self.steps_per_epoch or -(-len(rows) // (self.batch_size * self._world()[1])),
            num_workers=self.num_workers,
        )
        return self._loader

    def val_dataloader(self) -> Shard | list[Any]:
        tasks = self.evaluation_tasks("validation")
        return self._boxed(tasks) if tasks else []  # the empty list is how Lightning is told that there is nothing

    def test_dataloader(self) -> Shard:
        return self._boxed(self.evaluation_tasks("test"))

    def predict_dataloader(self) -> Shard:
        size = self.batch_size
        rank, world_size = self._world()
        batches = [self._items[start : start + size] for start in range(0, len(self._items), size)]
        return self._boxed(batches[rank::world_size])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves tensors; pairs, items and retrieval tasks have none and come through as they are."""
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
        """The distinct training pairs of this rank's next batches in order; the control phase's are left out.

        Args:
            batches: how many batches to look ahead.
        """
        first, sampler, rows = self.batches_trained, self._sampler(), self.train_pairs
        end = first + batches if self._control_collate is None else min(first + batches, self._control_start)
        numbers = dict.fromkeys(number for index in range(first, end) for number in sampler.batch(index))
        return [rows[number] for number in numbers]

    def restart(self) -> None:
        """Drops the training batches prepared ahead: what the collate function reads from has changed."""
        if self._loader is not None:
            self._loader.restart()

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
            pairs = read_pairs(source, seed=self.bundled_seed)
            return [replace(pair.query, fields={**pair.query.fields, "id": pair.id}) for pair in pairs]
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

    def _control_sampler(self) -> TaskBatchSampler:
        assert self._control is not None
        rank, world_size = self._world()
        return TaskBatchSampler(
            self._control.rows,
            self._control.weights,
            batch_size=self.control_batch_size,
            sub_batch_size=self.control_sub_batch_size,
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
            **self._control_stream(),
        }

    def _control_stream(self) -> dict[str, Any]:
        """What decides the control phase's part of the stream; empty without one."""
        if self._control is None:
            return {}
        return {
            "control": {
                "rows": {task: len(rows) for task, rows in self._control.rows.items()},
                "weights": self._control.weights,
                "global_batch_size": self.control_batch_size * self._world()[1],
                "sub_batch_size": self.control_sub_batch_size,
                "start": self._control_start,
            }
        }

    def _boxed(self, values: Sequence[Any]) -> Shard:
        return Shard(values, boxed=self.trainer is not None)
