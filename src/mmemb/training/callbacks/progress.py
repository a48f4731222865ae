"""The progress bar of a training that is budgeted in steps."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepsBar(RichProgressBar):
    """Lightning's rich bar; where steps bound the run it counts all of them, over epochs and resumes.

    Lightning's own starts anew with every epoch, which of so many (``Epoch 2/-2``) it cannot say.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run, or batches of the epoch where epochs bound the run."""
        return self.trainer.max_steps if self._counts_steps else super().total_train_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the bar once."""
        if self._counts_steps and self.train_progress_bar_id is not None:
            return
        super().on_train_epoch_start(trainer, pl_module)
        if self._counts_steps:
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        done = trainer.global_step - 1 if self._counts_steps else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_epochs in (-1, None) and self.trainer.max_steps > 0

    def _get_train_description(self, current_epoch: int) -> str:
        if self._counts_steps:
            return f"{'Steps':{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)
