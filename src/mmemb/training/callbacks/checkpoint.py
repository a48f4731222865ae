"""Lightning's part of checkpoints, over `mmemb.common.checkpoint`; apart, for importing Lightning takes seconds."""

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
    """Lightning's way of writing and reading checkpoints, made safe as the module docstring says."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes whole or not at all; `storage_options` is not supported."""
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO writes to a local or mounted folder: storage_options is not supported")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads tensors and plain containers; ``weights_only=False`` is refused."""
        if weights_only is False:
            raise ValueError(
                "mmemb reads checkpoints with weights_only=True alone: another way could run code from the file"
            )
        checkpoint = read_checkpoint(path, map_location="cpu" if map_location is None else map_location)
        if missing := [key for key in ("state_dict", "pytorch-lightning_version") if key not in checkpoint]:
            raise ValueError(f"{path} has no {missing[0]!r}, so no training wrote it; give a checkpoint of `mmemb fit`")
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a checkpoint, if it is there; a sharded one, which its strategy wrote, is a folder."""
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is also written at the end of training.

    Lightning's own leaves the last multiple of ``every_n_train_steps``: 250 steps saved every 200 would end at 200.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A dry run (fast_dev_run) leaves nothing behind, as with Lightning's.
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.save_last and not dry and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
