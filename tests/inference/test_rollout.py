"""Rollouts: what was drawn is kept as it was drawn, prompts are encoded once, groups get their share of decisions."""

from __future__ import annotations

import pytest
import torch

from mmemb.inference.rollout import Rollouts, continuation, rollout, token_log_probs
from mmemb.interfaces import Backbone, Pooler
from mmemb.types import Item, Text
from tests.inference.fakes import WORDS, FakeBackbone, FakePooler


def items(count: int = 5) -> list[Item]:
    return [Item("what is", (Text(" ".join(WORDS[i % 7 : i % 7 + 1 + i])),)) for i in range(count)]


def built(pooler: Pooler, width: int = 16) -> Pooler:
    pooler.build(width)
    return pooler


def sample(backbone: Backbone, pooler: Pooler, queries: list[Item], **options: object) -> Rollouts:
    settings = {"group_size": 4, "temperature": 1.0, "max_new_tokens": 6, "seed": 3} | options
    return rollout(backbone, pooler, queries, **settings)  # type: ignore[arg-type]


def again(backbone: Backbone, queries: list[Item], drawn: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [R, L] and states at ``<emb>`` [R, H] by one pass over prompts and continuations."""
    prefix = backbone.prefill(backbone.prepare(queries, embed=False))
    source = torch.arange(len(drawn)) // drawn.group_size
    rest = continuation(backbone, drawn)
    states, _ = backbone.extend(backbone.fork(prefix, source), rest.tokens, rest.mask)
    mask = drawn.token_mask
    log_prob = torch.zeros(mask.shape)
    picked = states[:, : mask.shape[1]][mask]
    log_prob[mask] = token_log_probs(backbone, picked, drawn.token_ids[mask], temperature=drawn.temperature)
    return log_prob, states[torch.arange(len(drawn)), rest.emb_column]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_over_what_was_drawn_gives_its_log_probabilities_and_embeddings(temperature: float) -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakePooler()), items()
    drawn = sample(backbone, pooler, queries, temperature=temperature, exploration=0.6)
    assert 0 < drawn.think.sum() < len(drawn)
    assert 0 < drawn.truncated.sum() < drawn.think.sum(), "rollouts should end both ways"
    log_prob, states = again(backbone, queries, drawn)
    torch.testing.assert_close(log_prob, drawn.log_prob, atol=1e-5, rtol=0)
    embedding = pooler(states[:, None], torch.ones(len(drawn), 1), torch.zeros(len(drawn), dtype=torch.int64))
    torch.testing.assert_close(embedding, drawn.embedding, atol=1e-5, rtol=0)
    assert states.requires_grad
