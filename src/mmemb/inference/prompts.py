"""Encodes prompts. A prompt encoded once gives the logits of the decision, the direct embedding and a cache.

Every path starts with the same prompt. Its last state predicts the decision (``<think>`` or ``<emb>``). One more token,
``<emb>`` on a fork of the cache, gives the direct embedding. ``<think> rationale </think> <emb>`` gives the reasoned
embedding. Only this module builds these token sequences.

Shape legend: B rows, T tokens of a prompt, L tokens of what follows, H hidden width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmemb.interfaces import Backbone, Model, Pooler, Prefix
from mmemb.types import EMB, END_THINK, THINK, Item, ModelInputs, pictures


@dataclass
class EncodedPrompts:
    """B encoded prompts. They have an autograd graph if gradients are on.

    Attributes:
        model: the model that encoded them.
        prefix: their key-value cache. Fork it before you extend it.
        items: the B items. None if the prompts came as prepared inputs.
    """

    model: Model
    prefix: Prefix
    items: Sequence[Item] | None = None

    @property
    def decision_logits(self) -> Tensor:
        """Logits [B, 2] float32 of ``<think>`` and ``<emb>`` after the prompt."""
        backbone = self.model.backbone
        ids = torch.tensor([backbone.token_id(THINK), backbone.token_id(EMB)], device=backbone.device)
        return backbone.logits(self.prefix.hidden)[:, ids].float()

    def direct(self) -> Tensor:
        """Computes the direct embeddings [B, D], on the model's device.

        This costs one more token per row. For a pooler that reads every state, the whole prompt is encoded again.
        """
        backbone, pooler = self.model.backbone, self.model.pooler
        if pooler.needs_all_states:
            assert self.items is not None, "a pooler that reads every state needs the items"
            return embed_items(self.model, self.items)
        rows = len(self.prefix.hidden)
        emb = torch.full((rows, 1), backbone.token_id(EMB), dtype=torch.int64, device=backbone.device)
        hidden, _ = backbone.extend(backbone.fork(self.prefix), emb)
        return embed_states(pooler, hidden[:, -1])


def encode_prompts(model: Model, prompts: Sequence[Item] | ModelInputs) -> EncodedPrompts:
    """Encodes B prompts once and keeps their key-value cache.

    Args:
        model: backbone and pooler.
        prompts: items, or the inputs that ``Backbone.prepare(items, embed=False)`` made of them.
    """
    if isinstance(prompts, ModelInputs):
        return EncodedPrompts(model, model.backbone.prefill(prompts.to(model.backbone.device)))
    return EncodedPrompts(model, prefill(model.backbone, prompts), prompts)


def prefill(backbone: Backbone, items: Sequence[Item]) -> Prefix:
    """Encodes B prompts and returns only their key-value cache."""
    return backbone.prefill(backbone.prepare(items, embed=False).to(backbone.device))


def embed_items(model: Model, items: Sequence[Item], rationales: Sequence[str | None] | None = None) -> Tensor:
    """Embeds B items in one plain forward pass.

    Rows with a rationale are teacher-forced.

    Returns:
        the embeddings [B, D], on the model's device.
    """
    return model.embed(model.backbone.prepare(items, rationales=rationales))


def embed_states(pooler: Pooler, hidden: Tensor) -> Tensor:
    """Computes the embeddings [B, D] of rows for which only the state at ``<emb>`` [B, H] is available."""
    rows = len(hidden)
    mask = torch.ones(rows, 1, dtype=torch.int64, device=hidden.device)
    return pooler(hidden[:, None], mask, torch.zeros(rows, dtype=torch.int64, device=hidden.device))


def thought_tokens(token_id: Callable[[str], int], written: Iterable[int] | None) -> list[int]:
    """Returns the token ids after a prompt: ``<think> rationale </think> <emb>``, or ``<emb>`` alone.

    Args:
        token_id: gives the ids of the special tokens, such as `Backbone.token_id`.
        written: token ids of the rationale. None for the direct path.
    """
    if written is None:
        return [token_id(EMB)]
    return [token_id(THINK), *written, token_id(END_THINK), token_id(EMB)]


def rationale_tokens(backbone: Backbone, text: str) -> list[int]:
    """Returns the token ids of a rationale, cut to the backbone's maximum length."""
    return backbone.tokenize(text)[: backbone.max_rationale_tokens]


def pad_tokens(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Pads rows of different lengths and returns their token ids and mask [B, L] int64 (1 = real).

    Args:
        rows: B lists of token ids.
        side: side of the padding. With padding on the left, the last column holds the last token of every row.
        device: device of the result.
    """
    width = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        columns = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        tokens[row, columns] = torch.tensor(ids, dtype=torch.int64)
        mask[row, columns] = 1
    return tokens.to(device), mask.to(device)


def length_order(items: Sequence[Item]) -> list[int]:
    """Returns row indices sorted by rough prompt length (pictures, then characters), longest first.

    Sorting keeps the padding in a batch small. With the longest first, a batch that does not fit into memory fails at
    once.
    """
    sizes = [(sum(1 for _ in pictures(item)), len(item.instruction) + len(item.text)) for item in items]
    return sorted(range(len(items)), key=lambda row: (-sizes[row][0], -sizes[row][1], row))
