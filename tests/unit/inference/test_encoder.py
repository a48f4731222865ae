"""Tests of the encoder: batching does not change results, and the model keeps its state."""

from __future__ import annotations

import pytest
import torch
from rich.progress import Progress

from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Controller, SetupContext
from mmemb.types import Decision, Item, PrefillState, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakePooler


def items(count: int = 9) -> list[Item]:
    return [Item("what is", (Text(" ".join(WORDS[i % 5 : i % 5 + 1 + i])),)) for i in range(count)]


def encoder(**options: object) -> Encoder:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    return Encoder(FakeBackbone(), pooler, **options)  # type: ignore[arg-type]


class Even(Controller):
    """Reasons if the third coordinate of the direct embedding is positive."""

    def decide(self, state: PrefillState) -> Decision:
        think = state.direct[:, 2] > 0
        return Decision(think, think.float(), torch.where(think, 8, 0))


def test_results_come_back_in_the_order_given() -> None:
    one, many = encoder(batch_size=64), encoder(batch_size=2)
    texts = ["red apple" if row % 3 == 0 else None for row in range(9)]
    torch.testing.assert_close(
        one.encode_queries(items(), texts), many.encode_queries(items(), texts), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(one.encode_targets(items()), many.encode_targets(items()), atol=1e-5, rtol=0)
    first, second = one.encode(items(), Even()), many.encode(items(), Even())
    torch.testing.assert_close(first.embedding, second.embedding, atol=1e-5, rtol=0)
    assert first.rationale == second.rationale
    assert first.thought.tolist() == second.thought.tolist()
    assert 0 < first.thought.sum() < 9


def test_direct_rows_of_an_adaptive_pass_equal_the_plain_path() -> None:
    both = encoder()
    out = both.encode(items(), Even())
    direct = both.encode_queries(items())
    torch.testing.assert_close(out.embedding[~out.thought], direct[~out.thought], atol=1e-5, rtol=0)
    assert out.tokens[~out.thought].sum() == 0


def test_paths_hold_direct_and_reasoned_embeddings_of_every_row() -> None:
    both = encoder(batch_size=4, budget=6)
    paths = both.encode_paths(items())
    torch.testing.assert_close(paths.state.direct, both.encode_queries(items()), atol=1e-5, rtol=0)
    torch.testing.assert_close(paths.embedding, both.encode_queries(items(), paths.rationale), atol=1e-4, rtol=0)
    assert paths.decision.think.all()
    assert (paths.tokens <= 8).all()
    assert both.encode_paths(items(), AlwaysReason(1)).tokens.max() <= 3


def test_modes_and_gradients_are_restored() -> None:
    both = encoder()
    both.backbone.train()
    both.backbone.head.eval()
    out = both.encode_queries(items(2))
    assert both.backbone.training
    assert not both.backbone.head.training
    assert both.backbone.layers.training
    assert not out.requires_grad
    assert torch.is_grad_enabled()


def test_no_items_give_no_rows() -> None:
    both = encoder()
    assert both.encode_queries([]).shape == (0, 16)
    out = both.encode([], AlwaysReason(4))
    assert out.embedding.shape == (0, 16)
    assert out.rationale == []


def test_a_progress_bar_is_not_shown_inside_another_one() -> None:
    with Progress():
        assert encoder(progress=True).encode_queries(items(2)).shape == (2, 16)


def test_errors_name_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="rationales has length 1 for 2 items"):
        encoder().encode_queries(items(2), ["x"])
    with pytest.raises(ValueError, match=r"Encoder\.batch_size is 0; give 1 or more"):
        encoder(batch_size=0)
