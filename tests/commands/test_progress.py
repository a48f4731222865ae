"""The bar counts what bounds the run: its steps, or the batches of an epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from standins import StandInData, StandInModule

from mmemb.commands import train as cli_module
from mmemb.training.callbacks.progress import StepsBar


def bar_of(**settings: Any) -> Any:
    """The task of the bar after a training with three batches an epoch."""
    bar = StepsBar()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(StandInModule(), datamodule=StandInData(rows=6))
    assert bar.progress is not None
    (task,) = bar.progress.tasks
    return task


def test_a_run_of_steps_has_one_bar_over_all_its_epochs() -> None:
    task = bar_of(max_steps=5, max_epochs=-1)
    assert (task.completed, task.total) == (5, 5)
    assert "Steps" in task.description


def test_a_run_of_epochs_has_lightnings_bar() -> None:
    task = bar_of(max_epochs=2)
    assert (task.completed, task.total) == (3, 3)
    assert "Epoch 1/1" in task.description


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("shown", [True, False])
def test_the_command_uses_it_unless_told_otherwise(shown: bool) -> None:
    argv = ["fit", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.enable_model_summary=false"]
    argv += [f"--trainer.enable_progress_bar={str(shown).lower()}", "--evaluate=false"]
    assert cli_module.main(argv) == 0
    callbacks = StandInModule.seen[-1].trainer.callbacks
    assert any(isinstance(callback, StepsBar) for callback in callbacks) is shown
