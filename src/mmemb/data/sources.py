"""Sources of rows: what a config names under ``data``, read as pairs or as retrieval tasks."""

from __future__ import annotations

from dataclasses import dataclass

from mmemb.common.checks import check_numbers
from mmemb.data.images import BUNDLED


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, or bundled data: ``bundled:train``, ``bundled:control``,
            ``bundled:validation``, ``bundled:test``, ``bundled:pretrain``. For predict also a folder of pictures.
        weight: how often each task of this source is drawn, relative to the tasks of other sources (training only).
        image_root: folder that image paths are relative to and must stay inside of; the file's own folder by default.
        tasks: keep these tasks only; all by default.
        limit: keep at most this many rows of each task; all by default.
        task: task name of rows that name none; the file's name by default (its folder's for MMEB files).
    """

    path: str
    weight: float = 1.0
    image_root: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    task: str | None = None

    def check(self, owner: str) -> None:
        """Refuses a choice of nothing. Not at once in `__init__`: the parser would bury the message in its own.

        Args:
            owner: the list that the source stands in, in messages.

        Raises:
            ValueError: no task or no row can be left.
        """
        check_numbers(f"{owner}, {self.path}: source", at_least=1, limit=self.limit)
        if self.tasks is not None and not self.tasks:
            raise ValueError(f"{owner}, {self.path}: source.tasks: is empty; name tasks, or leave it out for all")

    @property
    def bundled(self) -> str | None:
        """Split of the bundled data, None for a file."""
        return self.path.removeprefix(BUNDLED) if self.path.startswith(BUNDLED) else None


@dataclass(frozen=True)
class Stream:
    """Training pairs of a phase, and the shape of its batches.

    Args:
        sources: where the pairs come from, mixed by their weights.
        batch_size: rows of one rank's batch.
        sub_batch_size: rows that share a task, so that in-batch negatives are of the query's own kind; divides
            `batch_size`.
        task_weights: how often each task is drawn, relative to the others; a task not named keeps the weight of its
            source, 0 leaves a task out.
    """

    sources: list[Source]
    batch_size: int = 32
    sub_batch_size: int = 8
    task_weights: dict[str, float] | None = None

    def check(self, owner: str) -> None:
        """Refuses sizes below one and sources that can have no row.

        Args:
            owner: the stream's place in the settings, for messages.

        Raises:
            ValueError: as said.
        """
        check_numbers(owner, at_least=1, batch_size=self.batch_size, sub_batch_size=self.sub_batch_size)
        for source in self.sources:
            source.check(f"{owner}.sources")
