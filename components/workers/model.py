"""Rationales that a vision-language model writes itself, by default the one in training, before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmemb.digests import item_digest, module_digest, seed_of
from mmemb.inference.decode import sample
from mmemb.inference.encoder import evaluating
from mmemb.interfaces import Backbone, Worker
from mmemb.types import Item, Rationale, Text, pictures


class ModelWorker(Worker, name="model"):
    """Samples rationales from a vision-language model: the backbone in training unless another is given.

    The prompt is the worker's own. A model that knows nothing of the task can still say what it sees, so an item with
    pictures is shown with the worker's instruction instead of its own instruction and text; an item of text alone is
    asked as it stands.

    Args:
        backbone: the model; None: the one given to `bind`.
        instruction: what a picture is shown with.
        temperature: of the sampling, > 0.
        max_new_tokens: longest rationale, in tokens.
        batch_size: sequences decoded at once.
    """

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        instruction: str = "describe the picture",
        temperature: float = 1.0,
        max_new_tokens: int = 40,
        batch_size: int = 64,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"model worker: temperature is {temperature}, expected > 0 (equal answers are of no use)")
        self.backbone = backbone
        self.instruction = instruction
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def bind(self, backbone: Backbone) -> None:
        """Gives the worker the model in training; one that was built with a model of its own keeps that."""
        if self.backbone is None:
            self.backbone = backbone

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. A sample is seeded by its item's content and number, whatever the items around it.

        Equal texts of one item are merged (the first stays) and empty ones dropped: fewer than k may be left.
        """
        backbone = self._bound()
        prompts = [self._prompt(item) for item in items]
        digests = [item_digest(prompt) for prompt in prompts]
        # Queries that differ in their question alone share a prompt, and so their rationales.
        distinct = dict(zip(digests, prompts, strict=True))
        seeds = [seed_of(seed, key, number) for key in distinct for number in range(k)]
        with evaluating(backbone):
            samples = sample(
                backbone,
                [prompt for prompt in distinct.values() for _ in range(k)],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=seeds,
                batch_size=self.batch_size,
            )
        keys = list(distinct)
        written: dict[str, dict[str, Rationale]] = {key: {} for key in distinct}
        for row, (drawn, row_seed) in enumerate(zip(samples, seeds, strict=True)):
            if drawn.text:
                rationale = Rationale(
                    text=drawn.text,
                    worker=self.name,
                    model=backbone.identity,
                    seed=row_seed,
                    tokens=drawn.tokens,
                    finish_reason=drawn.finish_reason,
                )
                written[keys[row // k]].setdefault(drawn.text, rationale)
        return [list(written[key].values()) for key in digests]

    @property
    def settings(self) -> dict[str, Any]:
        """Model (identity and a probe of its weights), prompt and sampling."""
        backbone = self._bound()
        return {
            "worker": self.name,
            "model": backbone.identity,
            "weights": module_digest(backbone),
            "instruction": self.instruction,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def _bound(self) -> Backbone:
        if self.backbone is None:
            raise ValueError("model worker: no model yet; pass backbone= or call bind(backbone) first")
        return self.backbone

    def _prompt(self, item: Item) -> Item:
        if next(pictures(item), None) is None:
            return replace(item, fields={})
        seen = tuple(part for part in item.parts if not isinstance(part, Text))
        return Item(instruction=self.instruction, parts=seen)
