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

from mmemb.inference.adaptive import pool_last
from mmemb.training.objective import Parts, next_token_loss
from mmemb.types import EMB, END_THINK, THINK, Item, ModelInputs

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
    def encode(self, parts: Parts, *, write: bool) -> EncodedPaths:
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

    def encode(self, parts: Parts, *, write: bool) -> EncodedPaths:
        hidden = parts.backbone(self.direct)
        found = EncodedPaths(_pool(parts, hidden, self.direct), None, None)
        if write:
            found.nll = next_token_loss(parts.backbone, hidden, self.direct, self.direct_only())
        if self.reasoned is not None:
            hidden = parts.backbone(self.reasoned)
            found.reasoned = _pool(parts, hidden, self.reasoned)
            if found.nll is not None:
                found.nll = found.nll + next_token_loss(parts.backbone, hidden, self.reasoned)
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

    def encode(self, parts: Parts, *, write: bool) -> EncodedPaths:
        backbone = parts.backbone
        prefix = backbone.prefill(self.prompt)
        emb = self.tokens.new_full((len(self), 1), backbone.token_id(EMB))
        hidden, _ = backbone.extend(backbone.fork(prefix), emb)
        found = EncodedPaths(pool_last(parts.pooler, hidden[:, -1]), None, None)
        alone = self.direct_only()
        states, tokens = [prefix.hidden[alone]], [emb[alone, 0]]
        if len(self.rows):
            hidden, _ = backbone.extend(backbone.fork(prefix, self.rows), self.tokens, self.mask)
            last = self.mask.sum(1) - 1
            found.reasoned = pool_last(parts.pooler, hidden[torch.arange(len(hidden), device=hidden.device), last])
            # The state before each token: of the first one the prompt's last.
            before = torch.cat([prefix.hidden[self.rows][:, None], hidden[:, :-1]], dim=1)
            states.append(before[self.mask.bool()])
            tokens.append(self.tokens[self.mask.bool()])
        if write:
            logits = backbone.logits(torch.cat(states)).float()
            found.nll = F.cross_entropy(logits, torch.cat(tokens), reduction="sum")
        return found


def query_paths(
    parts: Parts, items: Sequence[Item], rows: Sequence[int], rationales: Sequence[str], augment: Augment
) -> QueryPaths:
    """Prepares a chunk on the CPU; safe in data-loader workers.

    Args:
        parts: the model; it decides whether the prompts are shared.
        items: the n queries.
        rows: the query each of the r rationales belongs to.
        rationales: r texts.
        augment: makes the picture hook; a query's picture must come out alike on both paths.
    """
    backbone, everyone = parts.backbone, range(len(items))
    owners = torch.tensor(rows, dtype=torch.int64)
    if parts.pooler.needs_all_states or not backbone.keeps_cache_in_training:
        reasoned = None
        if rows:
            reasoned = backbone.prepare([items[row] for row in rows], rationales=rationales, augment=augment(rows))
        return SeparatePaths(owners, backbone.prepare(items, augment=augment(everyone)), reasoned)
    think, end, emb = (backbone.token_id(token) for token in (THINK, END_THINK, EMB))
    following = [
        torch.tensor([think, *backbone.tokenize(text)[: backbone.max_rationale_tokens], end, emb])
        for text in rationales
    ]
    tokens = torch.zeros(len(rows), max(map(len, following), default=0), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(following):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return SharedPrompts(owners, backbone.prepare(items, embed=False, augment=augment(everyone)), tokens, mask)


def _pool(parts: Parts, hidden: Tensor, inputs: ModelInputs) -> Tensor:
    return parts.pooler(hidden, inputs.tensors["attention_mask"], inputs.emb_position)
