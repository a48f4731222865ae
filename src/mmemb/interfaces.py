"""Defines the interface of every kind of component.

A component is a class with a typed, documented constructor and a short name:

    class Longest(Selector, name="longest"): ...

Shape legend: see `mmemb.types`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from mmemb.registry import Component
from mmemb.types import (
    NO_LIMIT,
    Candidates,
    Decision,
    EvaluationTask,
    Item,
    ModelInputs,
    Pair,
    PrefillState,
    Rationale,
    Selection,
)


@dataclass
class Prefix:
    """An encoded prompt that the model can continue from.

    Attributes:
        cache: the model's key-value cache, with T columns.
        attention_mask: [B, T] int64.
        next_position: [B] int64, position id of the next token.
        hidden: [B, H], state of the last column. It predicts the decision.
    """

    cache: Any
    attention_mask: Tensor
    next_position: Tensor
    hidden: Tensor


class Backbone(nn.Module, Component, ABC, kind="backbone"):
    """Turns items into model inputs, runs the forward pass and decodes tokens.

    It owns the processor, the chat template, the special tokens, parameter-efficient tuning and quantisation. Inputs
    are left-padded, so ``<emb>`` is in the last column of every row that has it.
    """

    hidden_size: int
    """Width H of the hidden states."""
    max_rationale_tokens: int
    """Maximum length of a rationale in tokens. `prepare` cuts longer texts."""

    @abstractmethod
    def prepare(
        self,
        items: Sequence[Item],
        *,
        rationales: Sequence[str | None] | None = None,
        embed: bool = True,
        augment: Callable[[Any, int], Any] | None = None,
    ) -> ModelInputs:
        """Renders and tokenises B items on the CPU. Data-loader workers may call it.

        Args:
            items: the items.
            rationales: B entries, each a text or None. A row with a text becomes ``prompt <think> r </think> <emb>``,
                any other row ``prompt <emb>``.
            embed: False gives the prompt alone, for `prefill`. ``rationales`` must then be None.
            augment: called with (PIL image, row) for every picture before it is cut into patches.

        Raises:
            ValueError: an item has a part that the model does not support, or a picture cannot be read.
        """

    @abstractmethod
    def prepare_response(
        self, items: Sequence[Item], responses: Sequence[str], *, augment: Callable[[Any, int], Any] | None = None
    ) -> ModelInputs:
        """Renders ``prompt <think> response </think>`` for next-token training.

        The response and ``</think>`` have labels.
        """

    @abstractmethod
    def forward(self, inputs: ModelInputs) -> Tensor:
        """Returns the hidden states [B, T, H] of the last layer, after the final norm."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the vocabulary logits [..., V] of hidden states [..., H]."""

    @abstractmethod
    def prefill(self, inputs: ModelInputs) -> Prefix:
        """Encodes B prompts and keeps their key-value cache."""

    @abstractmethod
    def extend(self, prefix: Prefix, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Prefix]:
        """Encodes L more tokens [B, L] after a prefix. In the mask [B, L], 1 means a real token.

        Do not use the given prefix again. To continue from it more than once, extend a `fork` of it.

        Returns:
            the states [B, L, H] and the longer prefix.
        """

    @abstractmethod
    def fork(self, prefix: Prefix, rows: Tensor | None = None) -> Prefix:
        """Copies a prefix. If ``rows`` [R] int64 are given, the copy has only those rows."""

    def join(self, prefixes: Sequence[Prefix]) -> Prefix:
        """Joins the rows of several prefixes into one, in their order. Do not use the given prefixes again.

        Raises:
            NotImplementedError: the backbone does not join prefixes (``joins_prefixes``).
        """
        raise NotImplementedError(f"{type(self).__name__} does not join prefixes")

    @abstractmethod
    def token_id(self, token: str) -> int:
        """Returns the id of a special token: ``<think>``, ``</think>`` or ``<emb>``."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Turns token ids into text. Leaves out special tokens and strips leading and trailing blanks."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Turns a text into token ids as `prepare` does. A special token that is spelt out counts as plain text."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text, without special tokens."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), config and processor to a folder that can be loaded by its path."""

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """The settings that decide how much of an item's content the model sees, ready for JSON.

        Rationales and scores made with the model depend on them. Limits that raise an error when exceeded are left
        out, so that a user may raise such a limit and continue the work.
        """
        return {}

    @property
    def special_ids(self) -> Sequence[int]:
        """Ids of the tokenizer's other special tokens. Each of them ends a rationale, as ``</think>`` does."""
        return ()

    @property
    def joins_prefixes(self) -> bool:
        """Whether `join` works. The last rows of a batch that reason then continue together with the next batch."""
        return False

    @property
    def keeps_cache_in_training(self) -> bool:
        """Whether `prefill`, `fork` and `extend` work in training mode too. They do not with gradient checkpointing."""
        return True

    @property
    def has_adapters(self) -> bool:
        """Whether `without_adapters` changes the model."""
        return False

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Switches the adapters off inside the context, so that the model computes what its base model does."""
        yield

    @property
    @abstractmethod
    def identity(self) -> str:
        """Model id, revision and a digest of the architecture. Checkpoints with another identity are refused."""

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device


class Pooler(nn.Module, Component, ABC, kind="pooler"):
    """Turns the hidden states of each row into one normalised embedding."""

    needs_all_states: ClassVar[bool] = False
    """Whether the embedding depends on more than the state at ``<emb>``, so that the prompt's states must be kept."""

    @abstractmethod
    def setup(self, context: SetupContext) -> None:
        """Creates the parameters for hidden states of width ``context.hidden_size``."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Width D of the embeddings. Known after `setup`."""

    @abstractmethod
    def forward(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """Computes one embedding per row: [B, D] float32, L2-normalised.

        Args:
            hidden: [B, T, H] hidden states.
            attention_mask: [B, T].
            emb_position: [B], column of ``<emb>``.
        """


@dataclass
class Model:
    """A backbone and its pooler. Together they embed items."""

    backbone: Backbone
    pooler: Pooler

    @classmethod
    def assemble(cls, backbone: Backbone, pooler: Pooler) -> Model:
        """Sets up a new pooler for the backbone's hidden states and returns both as a model."""
        pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
        return cls(backbone, pooler)

    def embed(self, inputs: ModelInputs) -> Tensor:
        """Embeds B prepared rows that end in ``<emb>`` in one forward pass: [B, D], on the model's device."""
        inputs = inputs.to(self.backbone.device)
        return self.pooler(self.backbone(inputs), inputs.tensors["attention_mask"], inputs.emb_position)


Choose: TypeAlias = Callable[[Pair, int], Sequence[tuple[Rationale, float]]]
"""Maps (pair, seed) to the rationales that the pair trains on, each with its weight in the loss.

Without a rationale, the pair trains only the direct path.
"""


@dataclass(frozen=True)
class SetupContext:
    """What a component can use before its first call. Components receive it through ``setup(context)``.

    A component takes what it needs and ignores the rest. It may be set up again with other data or another model. An
    empty field keeps the value from an earlier setup.

    Attributes:
        hidden_size: width H of the backbone's hidden states, for a pooler.
        model: the model in training. None if there is none, for example when separate models make a rationale pool.
        items: every item that a worker will write rationales for.
        pairs: the pairs whose targets serve an evaluator as negatives.
        tasks: the retrieval tasks in the data of a phase, with all their candidates.
        choose: the selector's choice of rationales. None trains only the direct path.
        previous: the objective of the previous phase. None for the first phase.
    """

    hidden_size: int = 0
    model: Model | None = None
    items: Sequence[Item] = ()
    pairs: Sequence[Pair] = ()
    tasks: Sequence[EvaluationTask] = ()
    choose: Choose | None = None
    previous: Any = None


class Worker(Component, ABC, kind="worker"):
    """Writes rationales. It sees only the item, never the target."""

    def setup(self, context: SetupContext) -> None:
        """Receives the model in training and every item to write rationales for, before the first proposal."""

    @abstractmethod
    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """Proposes at most k rationales for each of B items. Equal seeds give equal rationales.

        Args:
            items: the items.
            k: maximum number of candidates per item. A worker that has fewer returns fewer.
            seed: determines every random choice.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that determines the output, ready for JSON. It is part of the content hash of the pool."""

    @property
    def report(self) -> str:
        """One line for the end of a run that says what the proposals cost. Empty if there is nothing to report."""
        return ""

    def release(self) -> None:
        """Frees the memory of the worker's own model, if it has one. The next proposal loads the model again."""


class Evaluator(Component, ABC, kind="evaluator"):
    """Scores how well a pair matches: its confidence ``c(q, t; arm)``.

    The arm is a rationale candidate, nothing (``none``) or a placebo.
    """

    @abstractmethod
    def setup(self, context: SetupContext) -> None:
        """Receives the model in training and the pairs that supply the negatives, before the first score.

        Every pair is scored against the targets of its own task in ``context.pairs``.
        """

    @abstractmethod
    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """Computes one confidence in nats for each row: a pair with a rationale or None.

        The score of a row does not depend on the other rows. Scores are log-probabilities or log-odds, because only
        the difference between the arms of a pair counts. Rows with the same pair object should share the encoding of
        their prompt (`mmemb.inference.shared_prompts`).
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that determines the scores, ready for JSON."""

    def release(self) -> None:
        """Frees the memory of the evaluator's own model, if it has one. The next score loads the model again."""


class Selector(Component, ABC, kind="selector"):
    """Chooses a rationale candidate or none. The choice depends only on the candidates, their scores and a seed."""

    @abstractmethod
    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """Chooses for one pair.

        Args:
            candidates: K >= 0 candidates with their scores.
            seed: differs between pairs and epochs, and is equal on every rank.
        """

    def select_many(self, candidates: Candidates, *, seed: int) -> tuple[Selection, ...]:
        """Chooses everything that the pair trains on, by default one choice by `select`. Takes the same arguments."""
        return (self.select(candidates, seed=seed),)


class Controller(Component, ABC, kind="controller"):
    """Decides after the prefill which queries reason, and with what token budget."""

    needs_utility: ClassVar[bool] = False
    """Whether a decision reads the result of reasoning: ``PrefillState.utility`` and the fields after it.

    Then every query reasons before the decision. This works in evaluation only.
    """
    budget: int | None = None
    """Maximum number of rationale tokens for a query that reasons. None: as many as the encoder allows."""

    @property
    def limit(self) -> int:
        """The ``budget`` as a `Decision` stores it."""
        return NO_LIMIT if self.budget is None else self.budget

    @abstractmethod
    def decide(self, state: PrefillState) -> Decision:
        """Decides for B queries."""

    def calibrate(self, state: PrefillState) -> None:
        """Fits the controller on validation queries, for which every field of the state is known."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `decide` fails until `calibrate` has been called."""
        return False

    @property
    def calibration(self) -> dict[str, float]:
        """The fitted values by constructor argument. A controller built with them makes the same decisions."""
        return {}
