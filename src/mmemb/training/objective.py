"""What a phase optimises: how its batch is made and what one step's backward computes. Knows contracts only."""

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
    """Updates nothing: a step outside a trainer leaves its gradients to the caller."""


@dataclass
class StepContext:
    """What a step needs of its trainer.

    Attributes:
        backward: runs a backward pass (the strategy's own, so that scaling and hooks apply).
        no_sync: a context in which gradients are not yet reduced across ranks.
        step: number of this step within the phase, from 0.
        steps: length of the phase.
        update: takes an optimiser step with the gradients so far and clears them, for objectives that update more
            than once on a batch; the last update is the trainer's own.
        show: puts a picture into the run's log under a name; None where nobody would see it.
    """

    backward: Callable[[Tensor], None] = Tensor.backward
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: int = 0
    steps: int = 1
    update: Callable[[], None] = _nothing
    show: Callable[[str, PILImage], None] | None = None


class Objective(nn.Module, Component, ABC, kind="objective"):
    """A phase's loss. Its own parameters (a learnable temperature) are trained with the model."""

    needs_rationales: bool = False
    """Whether the phase wants a rationale pool to be made before it starts."""
    needs_candidates: bool = False
    """Whether the phase wants the candidates of its data's tasks."""

    def setup(self, context: SetupContext) -> None:
        """Receives the selector's choice, the tasks of the phase's data, and the objective of the phase before.

        Called before the first batch, and again with another choice when the rationale pool has grown.
        """

    def phase_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides parameters for a resumed phase to go on exactly; plain containers."""
        return {}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Takes up a `phase_state`, before the first step."""

    @abstractmethod
    def collate(self, model: Model, pairs: Sequence[Pair], seed: int) -> Any:
        """Pairs -> a batch of CPU tensors; runs in data-loader workers; deterministic in the seed."""

    @abstractmethod
    def step(self, model: Model, batch: Any, context: StepContext) -> dict[str, Tensor]:
        """Accumulates gradients for one batch; returns scalars to log, ``loss`` among them."""


def augmenter(augment: PictureAugment | None, seeds: Sequence[int]) -> Callable[[Any, int], Any] | None:
    """The picture hook of `Backbone.prepare`: each row's pictures change by the row's own seed."""
    if augment is None:
        return None

    def apply(image: Any, row: int) -> Any:
        return augment(image, seeds[row])

    return apply


def next_token_loss(backbone: Backbone, hidden: Tensor, inputs: ModelInputs, rows: Tensor | None = None) -> Tensor:
    """Sum of next-token cross-entropies over the labelled positions (of the given rows only, if asked).

    Args:
        backbone: gives the logits; only labelled positions reach the vocabulary projection.
        hidden: [B, T, H].
        inputs: labels [B, T] as in `ModelInputs`.
        rows: [B] bool, rows that count.

    Returns:
        a scalar float32.
    """
    labels = inputs.labels[:, 1:]
    wanted = labels != -100
    if rows is not None:
        wanted = wanted & rows[:, None]
    logits = backbone.logits(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), labels[wanted], reduction="sum")
