"""Sharing a prompt changes the work, not the embedding."""

from __future__ import annotations

import pytest
import torch

from mmemb.inference.encoder import Encoder
from mmemb.inference.shared_prompts import encode_arms, last_states
from mmemb.interfaces import SetupContext
from mmemb.types import Item, Text
from tests.unit.inference.fakes import FakeBackbone, FakeMeanPooler, FakePooler

ITEMS = [Item("what is", (Text(text),)) for text in ("the capital of chile", "red", "blue apple dog left right")]
ARMS = (None, "peso", "the currency of peru", "sol " * 60)  # the last is longer than a rationale may be
ROWS = [(item, arm) for arm in ARMS for item in ITEMS]  # a prompt's rows apart from each other


def encoder(pooler: FakePooler, batch_size: int) -> Encoder:
    pooler.setup(SetupContext(hidden_size=16))
    return Encoder(FakeBackbone(seed=3), pooler, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_embeddings_are_those_of_rows_on_their_own(batch_size: int) -> None:
    made = encoder(FakePooler(), batch_size)
    items, arms = [item for item, _ in ROWS], [arm for _, arm in ROWS]
    apart = made.encode_queries(items, arms)
    torch.testing.assert_close(encode_arms(made, items, arms), apart, atol=1e-5, rtol=0)
    if batch_size == 64:
        assert made.backbone.calls[-3:] == ["prefill", "fork", "extend"]  # three prompts at once, each once


def test_a_pooler_that_looks_at_every_state_shares_nothing() -> None:
    made = encoder(FakeMeanPooler(), 64)
    items, arms = [item for item, _ in ROWS], [arm for _, arm in ROWS]
    torch.testing.assert_close(encode_arms(made, items, arms), made.encode_queries(items, arms), atol=1e-6, rtol=0)
    assert "prefill" not in made.backbone.calls


def test_no_rows_and_the_training_mode() -> None:
    backbone = FakeBackbone().train()
    assert last_states(backbone, [], [], batch_size=4).shape == (0, 16)
    assert last_states(backbone, ITEMS[:1] * 2, [[4], [5, 6]], batch_size=4).shape == (2, 16)
    assert backbone.training
