"""Tests of shared prompts: sharing reduces the work and does not change the embeddings."""

from __future__ import annotations

import pytest
import torch

from mmemb.inference.encoder import Encoder
from mmemb.inference.shared_prompts import encode_arms, last_states
from mmemb.interfaces import SetupContext
from mmemb.types import Item, Text
from tests.unit.inference.fakes import FakeBackbone, FakeMeanPooler, FakePooler

ITEMS = [Item("what is", (Text(text),)) for text in ("the capital of chile", "red", "blue apple dog left right")]
ARMS = (None, "peso", "the currency of peru", "sol " * 60)  # the last is longer than the maximum length of a rationale
ROWS = [(item, arm) for arm in ARMS for item in ITEMS]  # rows with the same prompt are not next to each other


def encoder(pooler: FakePooler, batch_size: int) -> Encoder:
    pooler.setup(SetupContext(hidden_size=16))
    return Encoder(FakeBackbone(seed=3), pooler, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_embeddings_equal_those_without_sharing(batch_size: int) -> None:
    made = encoder(FakePooler(), batch_size)
    items, arms = [item for item, _ in ROWS], [arm for _, arm in ROWS]
    apart = made.encode_queries(items, arms)
    torch.testing.assert_close(encode_arms(made, items, arms), apart, atol=1e-5, rtol=0)
    if batch_size == 64:
        assert made.backbone.calls[-3:] == ["prefill", "fork", "extend"]  # three prompts together, each encoded once


def test_a_pooler_that_reads_every_state_shares_nothing() -> None:
    made = encoder(FakeMeanPooler(), 64)
    items, arms = [item for item, _ in ROWS], [arm for _, arm in ROWS]
    torch.testing.assert_close(encode_arms(made, items, arms), made.encode_queries(items, arms), atol=1e-6, rtol=0)
    assert "prefill" not in made.backbone.calls


def test_no_rows_are_allowed_and_the_training_mode_is_restored() -> None:
    backbone = FakeBackbone().train()
    assert last_states(backbone, [], [], batch_size=4).shape == (0, 16)
    assert last_states(backbone, ITEMS[:1] * 2, [[4], [5, 6]], batch_size=4).shape == (2, 16)
    assert backbone.training
