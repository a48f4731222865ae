"""Describes the sources under ``data`` in a config. Their rows are read as pairs, retrieval tasks or items."""

from __future__ import annotations

from dataclasses import dataclass

from mmemb.common.checks import check_numbers
from mmemb.data.images import BUNDLED


@dataclass(frozen=True)
class Source:
    """A source of rows: a file or bundled data.

    Args:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, or bundled data: ``bundled:train``, ``bundled:control``,
            ``bundled:validation``, ``bundled:test``, ``bundled:pretrain``. For predict also a folder of pictures.
        weight: how often each task of this source is drawn, relative to the tasks of other sources (training only).
        image_root: folder that image paths are relative to and must not leave. By default, the file's own folder.
        tasks: tasks to keep. By default, all.
        limit: maximum number of rows per task. By default, all.
        task: task of rows that name none. By default, the name of the file, or of its folder for MMEB files.
    """

    path: str
    weight: float = 1.0
    image_root: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    task: str | None = None

    def check(self, owner: str) -> None:
        """Refuses settings that leave no rows. Not part of `__init__`, where the parser would hide the message.

        Args:
            owner: key of the list that has the source, for error messages.

        Raises:
            ValueError: the settings leave no task or no row.
        """
        check_numbers(f"{owner}, {self.path}: source", at_least=1, limit=self.limit)
        if self.tasks is not None and not self.tasks:
            raise ValueError(f"{owner}, {self.path}: source.tasks: is empty; name tasks, or remove the key to keep all")

    @property
    def bundled(self) -> str | None:
        """The split of the bundled data. None for a file."""
        return self.path.removeprefix(BUNDLED) if self.path.startswith(BUNDLED) else None


@dataclass(frozen=True)
class Stream:
    """The training pairs of a phase, and the shape of its batches.

    Args:
        sources: where the pairs come from, mixed by their weights.
        batch_size: rows per batch of one rank.
        sub_batch_size: rows that share a task, so that in-batch negatives are of the same kind as the query's positive.
            Must divide `batch_size`.
        task_weights: how often each task is drawn, relative to the others. A task that is not named keeps the weight of
            its source. 0 leaves a task out.
    """

    sources: list[Source]
    batch_size: int = 32
    sub_batch_size: int = 8
    task_weights: dict[str, float] | None = None

    def check(self, owner: str) -> None:
        """Refuses sizes below one, and sources whose settings leave no rows.

        Args:
            owner: key of the stream in the settings, for error messages.

        Raises:
            ValueError: a size is below one, or a source has no task or no row.
        """
        check_numbers(owner, at_least=1, batch_size=self.batch_size, sub_batch_size=self.sub_batch_size)
        for source in self.sources:
            source.check(f"{owner}.sources")
