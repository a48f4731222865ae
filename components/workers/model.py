"""The worker whose rationales the model in training writes itself, before training or (for a refresh) during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmemb.interfaces import Backbone, SetupContext, Worker
from mmemb.types import Item, Rationale, Text, pictures

from ._sampling import check_sampling, model_settings, sample_rationales


class ModelWorker(Worker, name="model"):
    """Samples rationales from a vision-language model: the backbone in training unless another is given.

    A model that knows nothing about the task can still describe a picture. So an item with pictures gets the worker's
    instruction instead of its own instruction and text. An item with text only is not changed. Queries that differ
    only in their question share a prompt, and so their rationales.

    Args:
        backbone: the model; None for the one given to `setup`.
        instruction: instruction for items with pictures. With null no item is changed, which suits a model that has
            learned the tasks.
        temperature: temperature of the sampling, > 0.
        max_new_tokens: maximum length of a rationale, in tokens.
        batch_size: number of sequences that are decoded at once.
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
        """Gives the worker the model in training. A worker that was built with another model keeps it."""
        if self.backbone is None and context.model is not None:
            self.backbone = context.model.backbone

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. A sample's seed depends on its item's content and its number, not on other items.

        Equal texts of one item are merged (the first stays) and empty ones are dropped, so fewer than k may be left.
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
        """The model's identity and a probe of its weights, the prompt and the sampling settings."""
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
        """The item as the model sees it."""
        if self.instruction is None or next(pictures(item), None) is None:
            return replace(item, fields={})
        seen = tuple(part for part in item.parts if not isinstance(part, Text))
        return Item(instruction=self.instruction, parts=seen)
