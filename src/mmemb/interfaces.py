"""Every contract on one page. A part is a class with a typed, documented constructor and a short name:

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
    """A prompt already encoded, ready to go on from.

    Attributes:
        cache: the model's key-value cache, T columns.
        attention_mask: [B, T] int64.
        next_position: [B] int64, position id of the next token.
        hidden: [B, H], state of the last column (it predicts the decision).
    """

    cache: Any
    attention_mask: Tensor
    next_position: Tensor
    hidden: Tensor


class Backbone(nn.Module, Component, ABC, kind="backbone"):
    """Turns items into model inputs, runs the forward pass, decodes.

    Owns processor, chat template, special tokens, parameter-efficient tuning, quantisation. Inputs are left-padded, so
    the last column is ``<emb>`` wherever a row has one.
    """

    hidden_size: int
    """Width H of the hidden states."""
    max_rationale_tokens: int
    """Longest rationale in tokens; a longer text is cut by `prepare`."""

    @abstractmethod
    def prepare(
        self,
        items: Sequence[Item],
        *,
        rationales: Sequence[str | None] | None = None,
        embed: bool = True,
        augment: Callable[[Any, int], Any] | None = None,
    ) -> ModelInputs:
        """Renders and tokenises B items on the CPU; safe in data-loader workers.

        Args:
            items: the items.
            rationales: B texts or None: ``prompt <think> r </think> <emb>`` where a row has one, else ``prompt <emb>``.
            embed: False gives the bare prompt (for `prefill`); rationales must then be None.
            augment: called with (PIL image, row) on every picture before it is patchified.

        Raises:
            ValueError: an item has a part the model cannot take, or a picture cannot be read.
        """

    @abstractmethod
    def prepare_response(
        self, items: Sequence[Item], responses: Sequence[str], *, augment: Callable[[Any, int], Any] | None = None
    ) -> ModelInputs:
        """``prompt <think> response </think>``, labels on response and ``</think>``: plain next-token training."""

    @abstractmethod
    def forward(self, inputs: ModelInputs) -> Tensor:
        """Hidden states [B, T, H] of the last layer (after the final norm)."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., H]."""

    @abstractmethod
    def prefill(self, inputs: ModelInputs) -> Prefix:
        """Encodes B prompts once and keeps the key-value cache."""

    @abstractmethod
    def extend(self, prefix: Prefix, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Prefix]:
        """Encodes L more tokens [B, L] after a prefix (mask [B, L], 1 = real); states [B, L, H] and the longer prefix.

        The given prefix must not be used again unless through `fork`.
        """

    @abstractmethod
    def fork(self, prefix: Prefix, rows: Tensor | None = None) -> Prefix:
        """An independent copy of a prefix, of the given rows [R] int64 only if asked."""

    def join(self, prefixes: Sequence[Prefix]) -> Prefix:
        """The rows of several prefixes as one, in their order; the given ones must not be used again.

        Raises:
            NotImplementedError: the backbone does not join prefixes (``joins_prefixes``).
        """
        raise NotImplementedError(f"{type(self).__name__} does not join prefixes")

    @abstractmethod
    def token_id(self, token: str) -> int:
        """Id of one of the special tokens ``<think>``, ``</think>``, ``<emb>``."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, outer blanks stripped."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text as `prepare` makes them; a special token spelt out in it is ordinary characters."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Length of a text in tokens, special tokens not counted."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), config and processor; the folder loads again by its path."""

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """What decides how much of an item's content the model sees, JSON-ready: what is made with it depends on it.

        A limit whose excess is an error does not count, so that it may be raised and the work gone on with.
        """
        return {}

    @property
    def special_ids(self) -> Sequence[int]:
        """Ids of the tokenizer's other special tokens; one of them ends a rationale as ``</think>`` does."""
        return ()

    @property
    def joins_prefixes(self) -> bool:
        """Whether `join` works: the last rows of a batch that think then go on with those of the next."""
        return False

    @property
    def keeps_cache_in_training(self) -> bool:
        """Whether `prefill`, `fork` and `extend` work in training mode too; gradient checkpointing rules it out."""
        return True

    @property
    def has_adapters(self) -> bool:
        """Whether `without_adapters` changes the model."""
        return False

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, the model answers as its base does, without what its adapters have learned."""
        yield

    @property
    @abstractmethod
    def identity(self) -> str:
        """Model id, revision and a digest of the architecture; a checkpoint of another identity is refused."""

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device


class Pooler(nn.Module, Component, ABC, kind="pooler"):
    """Hidden states -> one normalised embedding per row."""

    needs_all_states: ClassVar[bool] = False
    """Whether the embedding depends on more than the state at ``<emb>``, so that the prompt's states must be kept."""

    @abstractmethod
    def setup(self, context: SetupContext) -> None:
        """Creates the parameters for hidden states of width ``context.hidden_size``."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Width D of the embeddings (after `setup`)."""

    @abstractmethod
    def forward(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """Hidden [B, T, H], mask [B, T], position of ``<emb>`` [B] -> [B, D] float32, L2-normalised."""


@dataclass
class Model:
    """A backbone with its pooler: what embeds."""

    backbone: Backbone
    pooler: Pooler

    @classmethod
    def assemble(cls, backbone: Backbone, pooler: Pooler) -> Model:
        """Sets a new pooler up for the backbone's hidden states and returns both."""
        pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
        return cls(backbone, pooler)

    def embed(self, inputs: ModelInputs) -> Tensor:
        """Embeddings [B, D] of B prepared rows that end in ``<emb>``, by one forward pass, on the model's device."""
        inputs = inputs.to(self.backbone.device)
        return self.pooler(self.backbone(inputs), inputs.tensors["attention_mask"], inputs.emb_position)


Choose: TypeAlias = Callable[[Pair, int], Sequence[tuple[Rationale, float]]]
"""(pair, seed) -> the rationales that the pair trains on, each with its loss weight; none: the direct path only."""


@dataclass(frozen=True)
class SetupContext:
    """What a part may ask for before its first use: every contract has one ``setup(context)``.

    A part takes what it needs and ignores the rest. It may be set up again, with other data or another model; an empty
    field leaves in place what an earlier setup gave.

    Attributes:
        hidden_size: width H of the backbone's hidden states, for a pooler.
        model: the model in training; None where there is none, such as when a pool is made by models of its own.
        items: every item that a worker will be asked about.
        pairs: the pairs whose targets are an evaluator's negatives.
        tasks: the retrieval tasks of a phase's data, with all their candidates.
        choose: the selector's choice of rationales; None trains the direct path alone.
        previous: the objective of the phase before; None for the first.
    """

    hidden_size: int = 0
    model: Model | None = None
    items: Sequence[Item] = ()
    pairs: Sequence[Pair] = ()
    tasks: Sequence[EvaluationTask] = ()
    choose: Choose | None = None
    previous: Any = None


class Worker(Component, ABC, kind="worker"):
    """Writes rationales. Sees the item only, never the target."""

    def setup(self, context: SetupContext) -> None:
        """Receives the model in training and every item that will be asked about, before the first proposal."""

    @abstractmethod
    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """At most k rationales for each of B items; the same for the same seed.

        Args:
            items: the items.
            k: candidates an item; a worker that has fewer to say returns fewer.
            seed: derives every random choice.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that determines the output, JSON-ready: part of the pool's content hash."""

    @property
    def report(self) -> str:
        """One line for the end of a run: what the proposals cost; empty where there is nothing to say."""
        return ""

    def release(self) -> None:
        """Gives back the memory of a model of its own; the next proposal takes it again."""


class Evaluator(Component, ABC, kind="evaluator"):
    """Matching confidence c(q, t | r) of a pair given a rationale, given none, given a placebo."""

    @abstractmethod
    def setup(self, context: SetupContext) -> None:
        """Receives the model in training, and the pairs that fix the negatives, before the first score.

        Every pair is scored against targets of its own task among ``context.pairs``.
        """

    @abstractmethod
    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """One confidence in nats a (pair, rationale or None); pure: a row's score does not depend on the others.

        Log-probabilities or log-odds: what counts is the difference between the arms of a pair. Rows of the same pair
        object should share the work on their prompt (`mmemb.inference.shared_prompts`).
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that determines the scores, JSON-ready."""

    def release(self) -> None:
        """Gives back the memory of a model of its own; the next score takes it again."""


class Selector(Component, ABC, kind="selector"):
    """Chooses a candidate, or none. A pure function of the candidates, their scores and a seed."""

    @abstractmethod
    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        """The choice for one pair.

        Args:
            candidates: K >= 0 candidates with their scores.
            seed: differs by pair and epoch, equal on every rank.
        """

    def select_many(self, candidates: Candidates, *, seed: int) -> tuple[Selection, ...]:
        """All that the pair trains on: by default the one of `select`. Arguments as there."""
        return (self.select(candidates, seed=seed),)


class Controller(Component, ABC, kind="controller"):
    """Decides from the prefill who thinks, and for how long."""

    needs_utility: ClassVar[bool] = False
    """Whether a decision reads what thinking brought (``PrefillState.utility`` and the fields after it): then everybody
    thinks first (evaluation only)."""
    budget: int | None = None
    """Most rationale tokens of a row that thinks; None: as many as the encoder allows."""

    @property
    def limit(self) -> int:
        """``budget`` as a `Decision` has it."""
        return NO_LIMIT if self.budget is None else self.budget

    @abstractmethod
    def decide(self, state: PrefillState) -> Decision:
        """B decisions."""

    def calibrate(self, state: PrefillState) -> None:
        """Fits what the controller needs on validation queries (all of the state is known there)."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `decide` fails until `calibrate` was called."""
        return False

    @property
    def calibration(self) -> dict[str, float]:
        """What was fitted, by constructor argument: built with these, the controller decides alike."""
        return {}
