"""The interface of objectives: how a phase makes a batch and computes the gradients of a step.

It depends on the interfaces of the parts only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmemb.data.augment import PictureAugment
from mmemb.interfaces import Backbone, Model, SetupContext
from mmemb.registry import Component
from mmemb.types import ModelInputs, Pair

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def _nothing() -> None:
    """Does nothing: outside a trainer, a step leaves the update to the caller."""


@dataclass
class StepContext:
    """What a step needs from the trainer.

    Attributes:
        backward: runs a backward pass. It is the strategy's own, so that scaling and hooks apply.
        no_sync: a context in which gradients are not reduced across ranks yet.
        step: number of this step within the phase, from 0.
        steps: number of steps of the phase.
        update: takes an optimiser step with the gradients so far and clears them. It is for objectives that update more
            than once per batch. The trainer makes the last update itself.
        show: adds a picture to the run's log under a name. None if no logger takes pictures.
    """

    backward: Callable[[Tensor], None] = Tensor.backward
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: int = 0
    steps: int = 1
    update: Callable[[], None] = _nothing
    show: Callable[[str, PILImage], None] | None = None


class Objective(nn.Module, Component, ABC, kind="objective"):
    """The loss of a phase. Its own parameters, such as a learnable temperature, are trained with the model."""

    needs_rationales: bool = False
    """Whether the phase needs a rationale pool before it starts."""
    needs_candidates: bool = False
    """Whether the phase needs the candidates of the tasks in its data."""

    def setup(self, context: SetupContext) -> None:
        """Receives the selector's choice, the tasks of the phase's data, and the objective of the previous phase.

        It is called before the first batch. It is called again with another choice when the rationale pool has grown.
        """

    def phase_state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs, in addition to parameters, to resume the phase exactly: plain containers."""
        return {}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Restores a `phase_state` before the first step."""

    @abstractmethod
    def collate(self, model: Model, pairs: Sequence[Pair], seed: int) -> Any:
        """Makes a batch of CPU tensors from pairs.

        It runs in data-loader workers. Equal seeds give equal batches.
        """

    @abstractmethod
    def step(self, model: Model, batch: Any, context: StepContext) -> dict[str, Tensor]:
        """Accumulates the gradients of one batch. Returns the scalars to log, including ``loss``."""


def augmenter(augment: PictureAugment | None, seeds: Sequence[int]) -> Callable[[Any, int], Any] | None:
    """Returns the picture hook of `Backbone.prepare`, which augments the pictures of each row with the row's seed."""
    if augment is None:
        return None

    def apply(image: Any, row: int) -> Any:
        return augment(image, seeds[row])

    return apply


def next_token_loss(backbone: Backbone, hidden: Tensor, inputs: ModelInputs, rows: Tensor | None = None) -> Tensor:
    """Sums the next-token cross-entropies over the labelled positions, of the given rows only if there are any.

    Args:
        backbone: computes the logits. Only labelled positions go through the vocabulary projection.
        hidden: [B, T, H].
        inputs: labels [B, T] as in `ModelInputs`.
        rows: [B] bool, the rows that count. None: all.

    Returns:
        A float32 scalar.
    """
    labels = inputs.labels[:, 1:]
    wanted = labels != -100
    if rows is not None:
        wanted = wanted & rows[:, None]
    logits = backbone.logits(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), labels[wanted], reduction="sum")
