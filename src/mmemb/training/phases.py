"""The phases of a run: the objective, data, length and learning rate of each.

A run is a list of phases, one after the other. Step numbers count over the whole run. Steps in a phase count from 0.
"""

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
"""Learning-rate schedules of the transformers library that need only a warm-up and a length."""


class Phase:
    """One entry of ``model.phases``.

    Every phase but the first starts with an empty optimiser state, without the moments of the previous phase.

    Args:
        objective: what the phase optimises.
        data: where its pairs come from: ``train`` for ``data.train``, or a name in ``data.streams``.
        steps: number of optimiser steps. 0 skips the phase. Only the last phase may leave it out, and then lasts until
            the run ends.
        learning_rate_factor: the phase's highest learning rate divided by the optimiser's learning rate.
        schedule: learning-rate schedule over the phase's steps, from the transformers library.
        warmup_steps: steps of linear warm-up.
        name: name of the phase in logs and result rows. By default the objective's short name.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        data: str = "train",
        steps: int | None = None,
        learning_rate_factor: float = 1.0,
        schedule: Schedule = "cosine",
        warmup_steps: int = 50,
        name: str | None = None,
    ) -> None:
        check_numbers("phase", at_least=0, steps=steps, warmup_steps=warmup_steps)
        check_numbers("phase", above=0, learning_rate_factor=learning_rate_factor)
        self.objective = objective
        self.data = data
        self.steps = steps
        self.learning_rate_factor = learning_rate_factor
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.name = name or getattr(objective, "name", "") or type(objective).__name__.lower()


@dataclass(frozen=True)
class PhaseSpan:
    """The place of a phase within a run.

    Attributes:
        number: position of the phase in the list, from 0.
        name: name of the phase, unique within the run. A second phase of the same name gets the suffix ``_2``.
        phase: the phase.
        first_step: step of the run at which the phase starts.
        steps: length of the phase in this run, which may end before the phase does. None if the length is unknown.
    """

    number: int
    name: str
    phase: Phase
    first_step: int
    steps: int | None


def phase_spans(phases: Sequence[Phase], *, run_steps: int | None = None) -> list[PhaseSpan]:
    """Computes where each phase starts and ends in the run.

    Args:
        phases: at least one.
        run_steps: length of the run. None if it is not known yet.

    Raises:
        ValueError: there is no phase, a phase before the last has no length, or the run is longer than its phases.
    """
    if not phases:
        raise ValueError("model.phases is empty; give at least one phase, such as [{objective: joint}]")
    for number, phase in enumerate(phases[:-1]):
        if phase.steps is None:
            raise ValueError(f"model.phases[{number}].steps is missing; only the last phase may leave it out")
    total = total_steps(phases)
    if run_steps is not None and total is not None and run_steps > total:
        raise ValueError(
            f"trainer.max_steps: the run has {run_steps} steps, but its phases have {total} in total; lengthen a "
            "phase, leave out the steps of the last phase, or lower trainer.max_steps"
        )
    spans: list[PhaseSpan] = []
    first = 0
    for number, phase in enumerate(phases):
        repeats = sum(other.name == phase.name for other in phases[:number])
        name = f"{phase.name}_{repeats + 1}" if repeats else phase.name
        length = phase.steps
        if run_steps is not None:
            rest = max(run_steps - first, 0)
            length = rest if length is None else min(length, rest)
        spans.append(PhaseSpan(number, name, phase, first, length))
        first += phase.steps or 0
    return spans


def total_steps(phases: Sequence[Phase]) -> int | None:
    """Counts the steps of all phases. None if the last phase lasts until the run ends."""
    lengths = [phase.steps for phase in phases]
    return None if None in lengths else sum(length or 0 for length in lengths)


def span_at(spans: Sequence[PhaseSpan], step: int) -> PhaseSpan:
    """Finds the phase that a step of the run belongs to. Phases without steps are skipped."""
    return [span for span in spans if span.first_step <= step][-1]


def scheduler(optimizer: torch.optim.Optimizer, spans: Sequence[PhaseSpan]) -> LambdaLR:
    """Joins the phases' learning-rate schedules into one, which every parameter group follows.

    Args:
        optimizer: the optimiser. Its learning rate is the highest one of a phase with factor 1.
        spans: the phases with their lengths. Phases that the run does not reach are left out. Otherwise a run that ends
            before a phase and is resumed with more steps would start at the learning rate of that phase.
    """
    reached = [span for span in spans if span.number == 0 or span.steps]
    factors = [_factor(span) for span in reached]

    def factor(step: int) -> float:
        place = max(number for number, span in enumerate(reached) if number == 0 or span.first_step <= step)
        span = reached[place]
        return span.phase.learning_rate_factor * factors[place](step - span.first_step)

    return LambdaLR(optimizer, factor)


def _factor(span: PhaseSpan) -> Callable[[int], float]:
    """Returns the transformers schedule as a function of the phase's step, for a learning rate of 1."""
    from transformers import get_scheduler  # imports peft and bitsandbytes, which takes seconds

    steps = span.steps or 0
    one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = get_scheduler(
        span.phase.schedule,
        one,
        num_warmup_steps=min(span.phase.warmup_steps, steps),
        num_training_steps=max(steps, 1),
    )
    return made.lr_lambdas[0]
