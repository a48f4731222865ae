"""Prepares and encodes a chunk's queries on both paths, the direct and the reasoned one.

Both paths begin with the same prompt. `SharedPrompts` encodes the prompt once and continues from its cache, with a
graph: with ``<emb>`` on the direct path and with ``<think> rationale </think> <emb>`` on the reasoned path.
`SeparatePaths` encodes each path as a whole. It is for cases where a cache cannot be used: poolers that need every
state, and gradient checkpointing, which keeps no cache. Both give the same embeddings and losses. `query_paths` chooses
one of them.

Legend: n queries, r rationales, T columns of a prompt, L columns of a continuation, H hidden width, D embedding width.
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
from mmemb.types import Item, ModelInputs

Augment = Callable[[Sequence[int]], Callable[[Any, int], Any] | None]
"""Takes the numbers of some queries and returns the picture hook of `Backbone.prepare` for a batch of these queries."""


@dataclass
class EncodedPaths:
    """The outputs of the model for a chunk's queries.

    Attributes:
        direct: [n, D].
        reasoned: [r, D]. None if no query has a rationale.
        nll: float32 scalar, summed over the ``QueryPaths.written`` tokens. None if not requested.
    """

    direct: Tensor
    reasoned: Tensor | None
    nll: Tensor | None


@dataclass
class QueryPaths(ABC):
    """n queries, some of which have rationales.

    Attributes:
        rows: [r] int64, the query that each rationale belongs to. A query may have several.
    """

    rows: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """Returns n."""

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> QueryPaths:
        """Returns a copy with every tensor moved."""

    @abstractmethod
    def written(self) -> Tensor:
        """Counts the tokens that the model learns to write, a scalar.

        These are the tokens of every rationale with its ``<think>``, ``</think>`` and ``<emb>``, and the decision
        ``<emb>`` of each query without a rationale.
        """

    @abstractmethod
    def encode(self, model: Model, *, write: bool) -> EncodedPaths:
        """Runs backbone and pooler. ``write`` adds the loss of the tokens that the model learns to write."""

    def direct_only(self) -> Tensor:
        """Marks the queries without a rationale, [n] bool."""
        alone = torch.ones(len(self), dtype=torch.bool, device=self.rows.device)
        alone[self.rows] = False
        return alone


@dataclass
class SeparatePaths(QueryPaths):
    """Both paths as separate inputs.

    Attributes:
        direct: n rows, ``prompt <emb>``.
        reasoned: r rows, ``prompt <think> rationale </think> <emb>``. None if r is 0.
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
    """The prompts, and the tokens that follow them on the reasoned path.

    Attributes:
        prompt: n prompts without ``<emb>``.
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
        (direct,) = thought_tokens(backbone.token_id, None)
        emb = self.tokens.new_full((int(alone.sum()),), direct)
        states, tokens = [prefix.hidden[alone]], [emb]
        if len(self.rows):
            hidden, _ = backbone.extend(backbone.fork(prefix, self.rows), self.tokens, self.mask)
            last = self.mask.sum(1) - 1
            found.reasoned = embed_states(model.pooler, hidden[torch.arange(len(hidden), device=hidden.device), last])
            # The state before each token. For the first token this is the last state of the prompt.
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
    """Prepares a chunk on the CPU. It is safe in data-loader workers.

    Args:
        model: the model. It decides whether the prompts are shared.
        items: the n queries.
        rows: the query of each of the r rationales.
        rationales: r texts.
        augment: makes the picture hook. It must change a query's picture in the same way on both paths.
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
