"""Reports the progress of a run: a bar on a terminal, plain lines otherwise, and the same lines in a file.

A line of training gives the phase, the step of the run and of the phase, and the mean loss since the previous line. It
also gives the rate in this phase (validation excluded), the time left at that rate, and the memory in use:

    12:03:41 joint  step 120/460 (phase 120/400)  loss 3.214  1.9 steps/s  left 0:02:58  1,204 MB

`progress.log` in the run's folder has every line, including those of evaluation and of making rationales.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from mmemb.common import terminal

LOG_NAME = "progress.log"
"""The file in a run's folder that has all lines."""


class StepsBar(RichProgressBar):
    """Lightning's rich bar. If steps bound the run, it counts all of them, across epochs and resumes.

    Lightning's own bar starts again with every epoch and cannot say how many epochs there are (``Epoch 2/-2``).
    """

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run, or batches of the epoch if epochs bound the run."""
        return self.trainer.max_steps if self._counts_steps else super().total_train_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Creates the bar once."""
        if self._counts_steps and self.train_progress_bar_id is not None:
            return
        super().on_train_epoch_start(trainer, pl_module)
        if self._counts_steps:
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the bar."""
        done = trainer.global_step - 1 if self._counts_steps else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_epochs in (-1, None) and self.trainer.max_steps > 0

    def _get_train_description(self, current_epoch: int) -> str:
        if self._counts_steps:
            return f"{'Steps':{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)


class PhaseAt(NamedTuple):
    """The phase that a step belongs to.

    Attributes:
        name: the name of the phase in the lines.
        first_step: number of steps of the run before the phase.
        steps: number of steps of the phase. None if the run has no end.
    """

    name: str
    first_step: int
    steps: int | None


def phase_at(module: Any, step: int, total: int | None) -> PhaseAt:
    """Finds the phase of a module at a step.

    Args:
        module: a module with ``phase_at(step)``, such as ours. Any other module has one phase, ``train``.
        step: the step of the run, counted from 0.
        total: number of steps of the run. None if it has no end.
    """
    if not hasattr(module, "phase_at"):
        return PhaseAt("train", 0, total)
    found = module.phase_at(step)
    return PhaseAt(found.name, found.first_step, found.steps)


class ProgressLines(L.Callback):
    """Writes the progress lines of a run, and sends all other progress reports of the run to the same place.

    Args:
        show: whether to write the lines if there is no terminal. The file gets them in any case.
        every: minimum number of seconds between two lines of running work. None: `mmemb.common.terminal.interval`.
        stream: where the lines go. None: standard output, where Lightning's bar would be.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        *,
        show: bool = True,
        every: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.show = show
        self.every = every
        self.stream = stream
        self.clock = clock
        self._output = terminal.Output()
        self._in_use = ExitStack()
        self._evaluation = ExitStack()
        self._bar: terminal.Bar | None = None
        self._total: int | None = None
        self._phase = PhaseAt("train", 0, None)
        self._told: tuple[str, int] | None = None
        self._losses: list[Tensor] = []
        self._timed: tuple[float, int] | None = None
        self._paused = 0.0
        self._began = 0.0

    # -- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Opens the log. This is the first hook of a run, so that the log has what other hooks report."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: all ranks must call it
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._in_use.close()
        self._output = terminal.Output(
            self.stream or sys.stdout,
            show=self.show,
            file=None if dry else folder / LOG_NAME,
            every=self.every,
            clock=self.clock,
        )
        self._in_use.enter_context(terminal.using(self._output))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the log."""
        self._evaluation.close()
        self._in_use.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes a line that says where the run stopped."""
        if trainer.state.fn == "fit" and self._told is not None:
            of = "" if self._total is None else f"/{self._total:,}"
            self._output.write(f"stopped  step {trainer.global_step:,}{of}  {type(exception).__name__}")
        # Closed with the error, so that no bar reports that it has finished.
        self._evaluation.__exit__(type(exception), exception, exception.__traceback__)
        self._in_use.close()

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the first line."""
        steps = trainer.estimated_stepping_batches
        self._total = int(steps) if math.isfinite(steps) else None
        last = max(self._total - 1, 0) if self._total is not None else trainer.global_step
        self._enter(phase_at(pl_module, min(trainer.global_step, last), self._total))
        self._tell(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes a line at the end of a phase and one at the start of the next."""
        phase = phase_at(pl_module, trainer.global_step, self._total)
        if phase != self._phase:
            self._tell(trainer.global_step)
            self._enter(phase)
            self._tell(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step and writes a line if one is due."""
        if "loss" in trainer.callback_metrics:  # kept as a tensor, because reading it waits for the GPU
            self._losses.append(trainer.callback_metrics["loss"].detach().clone())
        if self._timed is None:  # the rate leaves out the first step, with its set-up and waiting
            self._timed, self._paused = (self.clock(), trainer.global_step), 0.0
        if self._output.is_due():
            self._tell(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last line."""
        self._tell(trainer.global_step)

    def _enter(self, phase: PhaseAt) -> None:
        self._phase, self._timed, self._losses = phase, None, []

    def _tell(self, step: int) -> None:
        """Writes the line of a step, unless the previous line was of the same step."""
        if self._told == (self._phase.name, step):
            return
        self._told = (self._phase.name, step)
        rate = None
        if self._timed is not None:
            began, first = self._timed
            past = self.clock() - began - self._paused
            rate = (step - first) / past if step > first and past > 0 else None
        left = None
        if self._total is not None and step >= self._total:
            left = 0.0
        elif self._total is not None and rate is not None:
            left = (self._total - step) / rate
        loss = f"{sum(map(float, self._losses)) / len(self._losses):.3f}" if self._losses else "-"
        self._losses = []
        self._output.write(
            f"{self._phase.name}  step {_of(step, self._total)} "
            f"(phase {_of(step - self._phase.first_step, self._phase.steps)})  loss {loss}  "
            f"{terminal.speed(rate, 'steps')}  left {terminal.duration(left)}  {terminal.memory()}"
        )

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the bar of the validation before the first step."""
        self._begin("sanity check", None)  # the trainer has not counted the tasks yet

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the bar of the validation before the first step."""
        self._evaluation.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes a line of training and one of validation."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._tell(trainer.global_step)
        self._began = self.clock()
        self._begin("validation", _sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a task."""
        self._advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the end of validation and the means over its tasks."""
        if trainer.sanity_checking:
            return
        self._evaluation.close()
        self._paused += self.clock() - self._began
        if means := _means(trainer.callback_metrics):
            self._output.write(f"validation  step {trainer.global_step:,}  {means}")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the first line of the evaluation."""
        self._begin("test", _sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a task."""
        self._advance()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last line of the evaluation."""
        self._evaluation.close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the first line of the prediction."""
        self._begin("predict", _sum(trainer.num_predict_batches), unit="batches")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        self._advance()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last line of the prediction."""
        self._evaluation.close()

    def _begin(self, title: str, total: int | None, *, unit: str = "tasks") -> None:
        self._bar = self._evaluation.enter_context(terminal.progress(title, total, unit=unit))

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.advance()


def _of(count: int, total: int | None) -> str:
    return f"{count:,}" if total is None else f"{count:,}/{total:,}"


def _sum(batches: Any) -> int | None:
    """Batches of all loaders. None if a loader has no end."""
    total = sum(batches) if isinstance(batches, list) else batches
    return int(total) if math.isfinite(total) else None


def _means(metrics: Mapping[str, Tensor]) -> str:
    """Scores of each mode over all tasks: ``never/hit@1 0.250`` from the metric ``validation/never/hit@1``."""
    shown = {name.split("/", 1)[1]: value for name, value in metrics.items() if name.startswith("validation/")}
    return "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items() if name.count("/") == 1)
