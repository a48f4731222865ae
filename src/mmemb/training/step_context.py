"""What the objective of a step needs from the trainer, as plain functions and numbers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import torch

from mmemb.training.objective import StepContext
from mmemb.training.phases import PhaseSpan


def step_context(module: L.LightningModule, optimizer: torch.optim.Optimizer, span: PhaseSpan) -> StepContext:
    """Collects what one step of a phase may use.

    Args:
        module: the module in training, attached to its trainer.
        optimizer: Lightning's wrapper of the optimiser.
        span: the phase of the step.
    """
    trainer = module.trainer

    def update() -> None:
        # Without Lightning's wrapper, which would count this update as a step of the run.
        raw = getattr(optimizer, "optimizer", optimizer)
        trainer.strategy.optimizer_step(raw, lambda: None, model=module)
        optimizer.zero_grad()

    writer: Any = getattr(module.logger, "experiment", None) if trainer.is_global_zero else None

    def show(name: str, picture: Any) -> None:
        writer.add_image(f"{span.name}/{name}", np.asarray(picture), module.global_step, dataformats="HWC")

    return StepContext(
        backward=module.manual_backward,
        # Only strategies that reduce gradients have this context. The others have nothing to delay.
        no_sync=getattr(trainer.strategy, "block_backward_sync", nullcontext),
        step=module.global_step - span.first_step,
        steps=span.steps or 0,
        update=update,
        show=show if hasattr(writer, "add_image") else None,
    )
