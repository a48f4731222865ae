"""Writes the embeddings of `mmemb predict`: every process writes its share as Parquet, batch by batch.

A single process writes ``embeddings.parquet`` to the run's folder. With several processes, each writes its own
``embeddings-<rank>-of-<processes>.parquet``. Memory holds one batch. `mmemb.search.exact` describes the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq

from mmemb.common.files import whole_file
from mmemb.inference.embedding_files import embedding_table, model_identity
from mmemb.inference.embeddings import direct
from mmemb.types import Item


class EmbeddingWriter(L.Callback):
    """Streams predicted embeddings to a temporary file, which gets its final name when it is complete.

    Attributes:
        path: the file of this process. None before the first prediction.
        rows: number of embeddings written.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.rows = 0
        self._model = ""
        self._file: pq.ParquetWriter | None = None
        self._open = ExitStack()  # holds the file and its temporary name from the first batch to the end

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        processes = trainer.world_size
        name = f"embeddings-{trainer.global_rank:05}-of-{processes:05}" if processes > 1 else "embeddings"
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / f"{name}.parquet"
        self.rows = 0
        self._model = model_identity(pl_module.backbone, pl_module.pooler)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Sequence[Item],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the embeddings [B, D] of B items as one row group."""
        table = embedding_table(batch, direct(outputs), model=self._model)
        if self._file is None:
            assert self.path is not None
            temporary = self._open.enter_context(whole_file(self.path))
            self._file = self._open.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
        self._file.write_table(table)
        self.rows += len(table)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._file is None or self.path is None:
            return  # there were fewer batches than processes, and this process got none
        self._file = None
        self._open.close()
        print(f"{self.path}: {self.rows} embeddings")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._file = None
        self._open.__exit__(type(exception), exception, exception.__traceback__)  # removes the temporary file
