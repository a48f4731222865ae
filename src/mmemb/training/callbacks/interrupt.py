"""Ctrl-C and SIGTERM leave a checkpoint from which the run goes on as if nothing had happened.

A signal that comes while a batch is trained waits for the batch's end, where optimiser, sampler and counters agree;
outside training it acts at once. A second signal does not wait. With several processes the ranks agree at each batch's
end, so that one rank's signal stops all of them at the same step.
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
    """A run was stopped by a signal. Not an `Exception`: nothing on the way up may swallow it.

    Attributes:
        signum: the signal's number; the exit code is 128 plus it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class InterruptCheckpoint(L.Callback):
    """Turns SIGINT and SIGTERM into an orderly stop with a checkpoint.

    Attributes:
        path: the checkpoint written, or None.
        finished: whether the training has come to its end.
        trained: its last checkpoint then, if one was kept.
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
        """Handles both signals inside; must run in the main thread."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked loader process: Ctrl-C in a terminal reaches it too, but the batch it prepares is still wanted;
            # SIGTERM is how its parent ends it.
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self._training and self._requested is None:
            self._requested = signum
            return
        raise Interrupted(signum)

    # -- when waiting pays -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = trainer.world_size > 1 and self._training

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops here if a signal came; raised before any other callback saves, as the checkpoint is written now."""
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
        """Notes from what an evaluation that is stopped may be made up for."""
        self.finished = True
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        self.trained = Path(last) if last and Path(last).exists() else None

    # -- what is left ------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._training = False
        stopped = isinstance(exception, Interrupted | KeyboardInterrupt | SIGTERMException)
        if stopped and trainer.state.fn == "fit" and trainer.global_step > 0:
            path = _folder(trainer) / CHECKPOINT_NAME
            trainer.save_checkpoint(path)
            self.path = path


def _folder(trainer: L.Trainer) -> Path:
    """Where the run keeps its checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
