"""A chunk's queries on both paths, the direct and the reasoned one, as inputs and through the model.

Both paths begin with the same prompt. `SharedPrompts` encodes it once and goes on from its cache, with a graph: by
``<emb>`` for the direct path, by ``<think> rationale </think> <emb>`` for the reasoned one. `SeparatePaths` encodes
either as a whole, where a cache does not do: for poolers that look at every state, and under gradient checkpointing,
which keeps no cache. Both come to the same embeddings and losses; `query_paths` chooses.

Legend: n queries, r rationales of them, T columns of a prompt, L of a continuation, H hidden width, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmemb.inference.prompts import embed_states, encode_prompts, pad_tokens, rationale_tokens, thought_tokens
from mmemb.interfaces import Model
from mmemb.training.objective import next_token_loss
from mmemb.types import EMB, Item, ModelInputs

Augment = Callable[[Sequence[int]], Callable[[Any, int], Any] | None]
"""Queries by number -> the picture hook of `Backbone.prepare` for a batch of them."""


@dataclass
class EncodedPaths:
    """What the model makes of a chunk's queries.

    Attributes:
        direct: [n, D].
        reasoned: [r, D]; None where no query has a rationale.
        nll: float32 scalar, summed over the ``QueryPaths.written`` tokens; None if not asked for.
    """

    direct: Tensor
    reasoned: Tensor | None
    nll: Tensor | None


@dataclass
class QueryPaths(ABC):
    """n queries, of which some have rationales.

    Attributes:
        rows: [r] int64, the query each rationale belongs to; a query may have several.
    """

    rows: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> QueryPaths:
        """Moves every tensor; returns a new object."""

    @abstractmethod
    def written(self) -> Tensor:
        """How many tokens the model should have written itself, a scalar.

        Those of every rationale with its brackets and ``<emb>``, and the decision ``<emb>`` of a query without one.
        """

    @abstractmethod
    def encode(self, model: Model, *, write: bool) -> EncodedPaths:
        """Through backbone and pooler; with ``write`` the loss of what should have been written comes along."""

    def direct_only(self) -> Tensor:
        """[n] bool, queries without a rationale."""
        alone = torch.ones(len(self), dtype=torch.bool, device=self.rows.device)
        alone[self.rows] = False
        return alone


@dataclass
class SeparatePaths(QueryPaths):
    """Both paths as inputs of their own.

    Attributes:
        direct: n rows, ``prompt <emb>``.
        reasoned: r rows, ``prompt <think> rationale </think> <emb>``; None where r is 0.
    """

    direct: ModelInputs
    reasoned: ModelInputs | None

    def __len__(self) -> int:
        return len(self.direct)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SeparatePaths:
        return SeparatePaths(
            self.rows.to(device, non_blocking=non_blocking),
            self.direct.to(device, non_blocking),
            None if self.reasoned is None else self.reasoned.to(device, non_blocking),
        )

    def written(self) -> Tensor:
        count = self.direct_only().sum()
        return count if self.reasoned is None else count + (self.reasoned.labels[:, 1:] != -100).sum()

    def encode(self, model: Model, *, write: bool) -> EncodedPaths:
        hidden = model.backbone(self.direct)
        found = EncodedPaths(_pooled(model, hidden, self.direct), None, None)
        if write:
            found.nll = next_token_loss(model.backbone, hidden, self.direct, self.direct_only())
        if self.reasoned is not None:
            hidden = model.backbone(self.reasoned)
            found.reasoned = _pooled(model, hidden, self.reasoned)
            if found.nll is not None:
                found.nll = found.nll + next_token_loss(model.backbone, hidden, self.reasoned)
        return found


@dataclass
class SharedPrompts(QueryPaths):
    """The prompts once, and what follows them.

    Attributes:
        prompt: n bare prompts.
        tokens: [r, L] int64, ``<think> rationale </think> <emb>``, right-padded.
        mask: [r, L] int64, 1 = real.
    """

    prompt: ModelInputs
    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedPrompts:
        rows, tokens, mask = (
            each.to(device, non_blocking=non_blocking) for each in (self.rows, self.tokens, self.mask)
        )
        return SharedPrompts(rows, self.prompt.to(device, non_blocking), tokens, mask)

    def written(self) -> Tensor:
        return self.direct_only().sum() + self.mask.sum()

    def encode(self, model: Model, *, write: bool) -> EncodedPaths:
        backbone = model.backbone
        prompts = encode_prompts(model, self.prompt)
        prefix = prompts.prefix
        found = EncodedPaths(prompts.direct(), None, None)
        alone = self.direct_only()
        emb = self.tokens.new_full((int(alone.sum()),), backbone.token_id(EMB))
        states, tokens = [prefix.hidden[alone]], [emb]
        if len(self.rows):
            hidden, _ = backbone.extend(backbone.fork(prefix, self.rows), self.tokens, self.mask)
            last = self.mask.sum(1) - 1
            found.reasoned = embed_states(model.pooler, hidden[torch.arange(len(hidden), device=hidden.device), last])
            # The state before each token: of the first one the prompt's last.
            before = torch.cat([prefix.hidden[self.rows][:, None], hidden[:, :-1]], dim=1)
            states.append(before[self.mask.bool()])
            tokens.append(self.tokens[self.mask.bool()])
        if write:
            logits = backbone.logits(torch.cat(states)).float()
            found.nll = F.cross_entropy(logits, torch.cat(tokens), reduction="sum")
        return found


def query_paths(
    model: Model, items: Sequence[Item], rows: Sequence[int], rationales: Sequence[str], augment: Augment
) -> QueryPaths:
    """Prepares a chunk on the CPU; safe in data-loader workers.

    Args:
        model: the model; it decides whether the prompts are shared.
        items: the n queries.
        rows: the query each of the r rationales belongs to.
        rationales: r texts.
        augment: makes the picture hook; a query's picture must come out alike on both paths.
    """
    backbone, everyone = model.backbone, range(len(items))
    owners = torch.tensor(rows, dtype=torch.int64)
    if model.pooler.needs_all_states or not backbone.keeps_cache_in_training:
        reasoned = None
        if rows:
            reasoned = backbone.prepare([items[row] for row in rows], rationales=rationales, augment=augment(rows))
        return SeparatePaths(owners, backbone.prepare(items, augment=augment(everyone)), reasoned)
    following = [thought_tokens(backbone.token_id, rationale_tokens(backbone, text)) for text in rationales]
    tokens, mask = pad_tokens(following, side="right")
    return SharedPrompts(owners, backbone.prepare(items, embed=False, augment=augment(everyone)), tokens, mask)


def _pooled(model: Model, hidden: Tensor, inputs: ModelInputs) -> Tensor:
    return model.pooler(hidden, inputs.tensors["attention_mask"], inputs.emb_position)
