"""Connects the checkpoints of `mmemb.common.checkpoint` to Lightning.

It is a module of its own because importing Lightning takes seconds.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from mmemb.common.checkpoint import read_checkpoint, write_checkpoint


class SafeCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoints through `mmemb.common.checkpoint`, which never runs code from a file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the whole checkpoint or nothing.

        Raises:
            TypeError: ``storage_options`` is given. It is not supported.
        """
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO does not support storage_options; it writes to a local or mounted folder")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads tensors and plain containers.

        Raises:
            ValueError: ``weights_only`` is False, or the file is not a training checkpoint.
        """
        if weights_only is False:
            raise ValueError("mmemb reads checkpoints with weights_only=True only; otherwise the file could run code")
        checkpoint = read_checkpoint(path, map_location="cpu" if map_location is None else map_location)
        if missing := [key for key in ("state_dict", "pytorch-lightning_version") if key not in checkpoint]:
            raise ValueError(f"{path} has no {missing[0]!r}, so no training wrote it; give a checkpoint of `mmemb fit`")
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint if it exists. A sharded checkpoint, which a strategy wrote, is a folder."""
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, but ``last.ckpt`` is also written at the end of training.

    Lightning's own class keeps the last multiple of ``every_n_train_steps``. If a run of 250 steps saves every 200
    steps, its ``last.ckpt`` would be that of step 200.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A dry run (fast_dev_run) writes no checkpoint, as in Lightning.
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.save_last and not dry and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
