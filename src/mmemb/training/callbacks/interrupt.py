"""Writes a checkpoint on Ctrl-C and SIGTERM from which the run continues as if it had not stopped.

A signal that arrives during a training batch waits for the end of the batch, where optimiser, sampler and counters
agree. Outside training it acts at once. A second signal does not wait. With several processes, the ranks agree at the
end of each batch, so that a signal to one rank stops all of them at the same step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

CHECKPOINT_NAME = "interrupted.ckpt"


class Interrupted(BaseException):
    """A signal stopped the run. It is not an `Exception`, so that no caller catches it by accident.

    Attributes:
        signum: the number of the signal. The exit code is 128 plus this number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class InterruptCheckpoint(L.Callback):
    """Turns SIGINT and SIGTERM into an orderly stop with a checkpoint.

    Attributes:
        path: the checkpoint that was written, or None.
        finished: whether the training has finished.
        trained: the last checkpoint of a finished training, or None if it kept none.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.finished = False
        self.trained: Path | None = None
        self._requested: int | None = None
        self._training = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles both signals inside the context. Must run in the main thread."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # This is a forked loader process. Ctrl-C in a terminal reaches it too, but its batch is still needed.
            # SIGTERM is how its parent ends it.
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self._training and self._requested is None:
            self._requested = signum
            return
        raise Interrupted(signum)

    # -- when to wait ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = trainer.world_size > 1 and self._training

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the run if a signal came. It raises before any other callback saves a checkpoint of the same step."""
        requested = self._requested
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(requested is not None, all=False):
            requested = requested or signal.SIGTERM
        if requested is not None:
            raise Interrupted(requested)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = False
        if self._requested is not None:
            raise Interrupted(self._requested)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the last checkpoint, from which a stopped evaluation can be run again."""
        self.finished = True
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        self.trained = Path(last) if last and Path(last).exists() else None

    # -- after a stop ------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._training = False
        stopped = isinstance(exception, Interrupted | KeyboardInterrupt | SIGTERMException)
        if stopped and trainer.state.fn == "fit" and trainer.global_step > 0:
            path = _folder(trainer) / CHECKPOINT_NAME
            trainer.save_checkpoint(path)
            self.path = path


def _folder(trainer: L.Trainer) -> Path:
    """The folder in which the run keeps its checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
