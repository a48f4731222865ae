"""Provides a small backbone with the whole interface: word tokens, two causal attention layers and a real cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmemb.interfaces import Backbone, Pooler, Prefix, SetupContext
from mmemb.types import EMB, END_THINK, THINK, Item, ModelInputs, pictures

SENTENCE = "what is the currency capital of chile peru red blue apple dog left right peso sol lima"
WORDS = tuple(SENTENCE.split(" "))
SPECIALS = ("<pad>", THINK, END_THINK, EMB)


class FakeBackbone(Backbone):
    """A backbone with random weights from a seed.

    ``calls`` lists the methods that were called, and ``cells`` counts the tokens computed.
    """

    special_ids = (0,)

    def __init__(self, *, seed: int = 0, hidden: int = 16, max_rationale_tokens: int = 48) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.max_rationale_tokens = max_rationale_tokens
        self.vocabulary = SPECIALS + WORDS
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.token = nn.Embedding(len(self.vocabulary), hidden)
            self.layers = nn.ModuleList(nn.Linear(hidden, 4 * hidden, bias=False) for _ in range(2))
            for layer in self.layers:
                nn.init.normal_(layer.weight, std=0.4)
            self.head = nn.Linear(hidden, len(self.vocabulary))
        self.cells = 0
        self.calls: list[str] = []

    def _ids(self, text: str) -> list[int]:
        known = [word for word in text.lower().split() if word in self.vocabulary]
        return [self.vocabulary.index(word) for word in known]

    def prepare(
        self,
        items: Sequence[Item],
        *,
        rationales: Sequence[str | None] | None = None,
        embed: bool = True,
        augment: Callable[[Any, int], Any] | None = None,
    ) -> ModelInputs:
        think, end_think, emb = (self.token_id(token) for token in (THINK, END_THINK, EMB))
        rows = []
        for index, item in enumerate(items):
            ids = self._ids(f"{item.instruction} {item.text}") + [4 + len(str(name)) % 5 for name in pictures(item)]
            rationale = None if rationales is None else rationales[index]
            if rationale is not None:
                ids += [think, *self._ids(rationale)[: self.max_rationale_tokens], end_think]
            rows.append(ids + [emb] * embed)
        longest = max(map(len, rows))
        input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
        position = torch.full((len(rows),), longest - 1 if embed else -1)
        tensors = {"input_ids": input_ids, "attention_mask": mask}
        return ModelInputs(tensors, position, torch.full_like(input_ids, -100))

    def prepare_response(
        self, items: Sequence[Item], responses: Sequence[str], *, augment: Callable[[Any, int], Any] | None = None
    ) -> ModelInputs:
        return self.prepare(items, rationales=responses)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Computes new columns ids [B, L] after a cache. The mask [B, T + L] covers both."""
        self.cells += ids.numel()
        angle = positions[..., None] / (10.0 ** (torch.arange(self.hidden_size) / self.hidden_size))
        x = self.token(ids) + angle.sin()
        total, new = mask.shape[1], ids.shape[1]
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        allowed = causal & mask[:, None, :].bool()
        grown = []
        for index, layer in enumerate(self.layers):
            q, k, v, gate = layer(x).chunk(4, dim=-1)
            if cache is not None:
                k, v = torch.cat([cache[index][0], k], dim=1), torch.cat([cache[index][1], v], dim=1)
            grown.append((k, v))
            scores = (q @ k.mT / math.sqrt(self.hidden_size)).masked_fill(~allowed, -1e9)
            x = x + scores.softmax(dim=-1) @ v * gate.sigmoid()
        return nn.functional.layer_norm(x, (self.hidden_size,)), grown

    def forward(self, inputs: ModelInputs) -> Tensor:
        self.calls.append("forward")
        mask = inputs.tensors["attention_mask"]
        return self._run(inputs.tensors["input_ids"], mask, (mask.cumsum(1) - 1).clamp(min=0), None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return 3 * self.head(hidden)

    def prefill(self, inputs: ModelInputs) -> Prefix:
        self.calls.append("prefill")
        mask = inputs.tensors["attention_mask"]
        hidden, cache = self._run(inputs.tensors["input_ids"], mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        return Prefix(cache, mask, mask.sum(1), hidden[:, -1])

    def extend(self, prefix: Prefix, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Prefix]:
        self.calls.append("extend")
        mask = torch.ones_like(tokens) if mask is None else mask
        whole = torch.cat([prefix.attention_mask, mask], dim=1)
        positions = prefix.next_position[:, None] + mask.cumsum(1) - 1
        hidden, cache = self._run(tokens, whole, positions, prefix.cache)
        return hidden, Prefix(cache, whole, prefix.next_position + mask.sum(1), hidden[:, -1])

    def fork(self, prefix: Prefix, rows: Tensor | None = None) -> Prefix:
        self.calls.append("fork")
        rows = torch.arange(len(prefix.next_position)) if rows is None else rows
        cache = [(k[rows], v[rows]) for k, v in prefix.cache]
        return Prefix(cache, prefix.attention_mask[rows], prefix.next_position[rows], prefix.hidden[rows])

    def join(self, prefixes: Sequence[Prefix]) -> Prefix:
        self.calls.append("join")
        masks = [prefix.attention_mask for prefix in prefixes]
        width = max(mask.shape[1] for mask in masks)
        missing = [width - mask.shape[1] for mask in masks]
        cache = [
            tuple(
                torch.cat([nn.functional.pad(part, (0, 0, n, 0)) for part, n in zip(parts, missing, strict=True)])
                for parts in zip(*layers, strict=True)
            )
            for layers in zip(*(prefix.cache for prefix in prefixes), strict=True)
        ]
        mask = torch.cat([nn.functional.pad(each, (n, 0)) for each, n in zip(masks, missing, strict=True)])
        next_position = torch.cat([prefix.next_position for prefix in prefixes])
        return Prefix(cache, mask, next_position, torch.cat([prefix.hidden for prefix in prefixes]))

    joins_prefixes = True

    def token_id(self, token: str) -> int:
        return self.vocabulary.index(token)

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.vocabulary[token] for token in tokens if token >= len(SPECIALS))

    def tokenize(self, text: str) -> list[int]:
        return self._ids(text)

    def count_tokens(self, text: str) -> int:
        return len(self._ids(text))

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    @property
    def identity(self) -> str:
        return "fake"


class FakePooler(Pooler):
    """Reads the state at ``<emb>``, normalised."""

    def setup(self, context: SetupContext) -> None:
        self._size = context.hidden_size

    @property
    def size(self) -> int:
        return self._size

    def forward(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        return nn.functional.normalize(hidden[torch.arange(len(hidden)), emb_position].float(), dim=-1)


class FakeMeanPooler(FakePooler):
    """Averages every real state, as an example of a pooler that needs all states."""

    needs_all_states = True

    def forward(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        weight = attention_mask[..., None].float()
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
