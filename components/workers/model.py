"""Rationales that the model in training writes itself, before it is trained or (for a refresh) while it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmemb.interfaces import Backbone, SetupContext, Worker
from mmemb.types import Item, Rationale, Text, pictures

from ._sampling import check_sampling, model_settings, sample_rationales


class ModelWorker(Worker, name="model"):
    """Samples rationales from a vision-language model: the backbone in training unless another is given.

    The prompt is the worker's own. A model that knows nothing of the task can still say what it sees, so an item with
    pictures is shown with the worker's instruction instead of its own instruction and text; an item of text alone is
    asked as it stands. Queries that differ in their question alone share a prompt, and so their rationales.

    Args:
        backbone: the model; None: the one given to `bind`.
        instruction: what a picture is shown with; null shows every item as it stands, which is what a model that has
            learned the tasks wants.
        temperature: of the sampling, > 0.
        max_new_tokens: longest rationale, in tokens.
        batch_size: sequences decoded at once.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        instruction: str | None = "describe the picture",
        temperature: float = 1.0,
        max_new_tokens: int = 40,
        batch_size: int = 64,
    ) -> None:
        check_sampling(self.name, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self.backbone = backbone
        self.instruction = instruction
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def setup(self, context: SetupContext) -> None:
        """Gives the worker the model in training; one that was built with a model of its own keeps that."""
        if self.backbone is None and context.model is not None:
            self.backbone = context.model.backbone

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. A sample is seeded by its item's content and number, whatever the items around it.

        Equal texts of one item are merged (the first stays) and empty ones dropped: fewer than k may be left.
        """
        return sample_rationales(
            self._bound(),
            [self.prompt(item) for item in items],
            k,
            worker=self.name,
            seed=seed,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            think=True,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Model (identity and a probe of its weights), prompt and sampling."""
        return {
            "worker": self.name,
            **model_settings(self._bound()),
            "instruction": self.instruction,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def _bound(self) -> Backbone:
        if self.backbone is None:
            raise ValueError(
                "model worker: no model yet; pass backbone=, or call setup with the model in training first"
            )
        return self.backbone

    def prompt(self, item: Item) -> Item:
        """What the model is shown of an item."""
        if self.instruction is None or next(pictures(item), None) is None:
            return replace(item, fields={})
        seen = tuple(part for part in item.parts if not isinstance(part, Text))
        return Item(instruction=self.instruction, parts=seen)
