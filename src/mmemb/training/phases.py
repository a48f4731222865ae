"""A phase that follows another within one run: from which step, on which objective, at which learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.optim.lr_scheduler import LambdaLR

from mmemb.common.checks import check_numbers
from mmemb.training.objective import Objective

Schedule: TypeAlias = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts"
]
"""Learning-rate schedules of the transformers library that need no settings but warm-up and length."""


class Phase:
    """The rest of a run from one step on.

    Its batches come from ``data.control``. The optimiser begins anew: what it remembers of other gradients is dropped.

    Args:
        objective: what the phase optimises.
        start: steps of the run before it; a run that is shorter never comes to it, and 0 leaves the first phase out.
        learning_rate_factor: the phase's highest learning rate over the optimiser's own.
        schedule: learning-rate schedule over the phase's steps, by the transformers library.
        warmup_steps: steps of linear warm-up.

    Raises:
        ValueError: ``start`` is negative, or the factor is not positive.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        start: int,
        learning_rate_factor: float = 1.0,
        schedule: Schedule = "cosine",
        warmup_steps: int = 5,
    ) -> None:
        check_numbers("phase", at_least=0, start=start)
        check_numbers("phase", above=0, learning_rate_factor=learning_rate_factor)
        self.objective = objective
        self.start = start
        self.learning_rate_factor = learning_rate_factor
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps


@dataclass(frozen=True)
class Span:
    """The learning rate of some steps.

    Attributes:
        steps: how many.
        schedule: its form.
        warmup_steps: of them.
        factor: its highest value over the optimiser's own.
    """

    steps: int
    schedule: Schedule
    warmup_steps: int
    factor: float = 1.0


def scheduler(optimizer: torch.optim.Optimizer, spans: Sequence[Span]) -> LambdaLR:
    """A schedule of one span after the other, each from its own beginning; every parameter group follows it alike."""
    factors = [_factor(span) for span in spans]

    def factor(step: int) -> float:
        start = 0
        for span, value in zip(spans[:-1], factors, strict=False):
            if step < start + span.steps:
                return span.factor * value(step - start)
            start += span.steps
        return spans[-1].factor * factors[-1](step - start)

    return LambdaLR(optimizer, factor)


def _factor(span: Span) -> Callable[[int], float]:
    """The library's schedule as a function of the step, for a learning rate of 1."""
    from transformers import get_scheduler  # loads peft and bitsandbytes, seconds that only a training should take

    one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = get_scheduler(
        span.schedule, one, num_warmup_steps=min(span.warmup_steps, span.steps), num_training_steps=max(span.steps, 1)
    )
    return made.lr_lambdas[0]
