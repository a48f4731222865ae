"""Tests decoding with every model family: rows are independent, and the cache path equals encoding again.

The batch mixes a picture, several pictures, text alone and the frames of a video. Some rows reason and others do not,
and the rationales have several lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.inference.adaptive import AdaptivePaths, adaptive_paths
from mmemb.inference.encoder import evaluating
from mmemb.inference.rollout import rollout, rollout_tokens, token_log_probs
from mmemb.interfaces import Backbone, Controller, Model, Pooler, SetupContext
from mmemb.registry import create
from mmemb.types import EMB, END_THINK, THINK, Decision, Image, Item, PrefillState, Text, Video

TOLERANCE = 1e-4  # float32: sums run in another order
BUDGETS = (7, 0, 3, 9, 0)


class Given(Controller):
    """Gives each row its budget. A budget of 0 skips reasoning."""

    def __init__(self, *budgets: int) -> None:
        self.budgets = budgets

    def decide(self, state: PrefillState) -> Decision:
        budget = torch.tensor(self.budgets)
        return Decision(budget > 0, (budget > 0).float(), budget)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def backbone(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(request.param)


@pytest.fixture
def items(picture: Callable[..., Any]) -> list[Item]:
    return [
        Item("what is shown", (Image(picture(64, 64, 1)),)),
        Item("find", (Image(picture(96, 32, 2)), Text("left of the"), Image(picture(80, 50, 3)))),
        Item("", (Text("peso of chile ?"),)),
        Item("what is left", (Video((picture(32, 32, 4), picture(32, 64, 5), picture(32, 32, 6))),)),
        Item("what is the picture of the dog and the cat left of", (Text("red apple"),)),
    ]


@pytest.fixture
def pooler(backbone: Backbone) -> Pooler:
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    return pooler


def run(
    backbone: Backbone, pooler: Pooler, items: list[Item], budgets: tuple[int, ...], **options: Any
) -> AdaptivePaths:
    with evaluating(backbone, pooler):
        return adaptive_paths(Model(backbone, pooler), items, Given(*budgets), budget=48, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_row_alone_equals_the_row_in_a_mixed_batch(
    backbone: Backbone, pooler: Pooler, items: list[Item], temperature: float
) -> None:
    together = run(backbone, pooler, items, BUDGETS, temperature=temperature, seed=[5, 6, 7, 8, 9])
    assert together.decision.think.tolist() == [True, False, True, True, False]
    assert (together.tokens <= torch.tensor(BUDGETS) + 2).all()
    for row, item in enumerate(items):
        alone = run(backbone, pooler, [item], (BUDGETS[row],), temperature=temperature, seed=[5 + row])
        assert alone.token_ids == [together.token_ids[row]]
        assert bool(alone.truncated) == bool(together.truncated[row])
        for mine, batched in (
            (alone.embedding, together.embedding),
            (alone.state.direct, together.state.direct),
            (alone.state.decision_logits, together.state.decision_logits),
        ):
            torch.testing.assert_close(mine[0], batched[row], atol=TOLERANCE, rtol=TOLERANCE)


def test_the_last_rows_of_a_batch_continue_with_the_next_batch(
    backbone: Backbone, pooler: Pooler, items: list[Item]
) -> None:
    assert backbone.joins_prefixes
    with evaluating(backbone, pooler):
        whole, batched = (
            adaptive_paths(
                Model(backbone, pooler),
                items,
                AlwaysReason(9),
                budget=48,
                temperature=1.0,
                seed=[5, 6, 7, 8, 9],
                batch_size=size,
            )
            for size in (None, 2)
        )
    assert batched.token_ids == whole.token_ids
    assert torch.equal(batched.truncated, whole.truncated)
    torch.testing.assert_close(batched.embedding, whole.embedding, atol=TOLERANCE, rtol=TOLERANCE)


def test_sliding_window_caches_join_too(make_backbone: Callable[..., Backbone]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "layer_types": None}
    backbone = make_backbone("qwen2_5_vl", config_overrides={"text_config": window})
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    items = [Item("what is", (Text("red apple " * count),)) for count in (9, 6, 3, 1, 1)]
    assert backbone.prefill(backbone.prepare(items, embed=False)).cache.is_sliding == [True, True]
    seeds = [5, 6, 7, 8, 9]
    with evaluating(backbone, pooler):
        whole, batched = (
            adaptive_paths(
                Model(backbone, pooler), items, AlwaysReason(9), budget=9, temperature=1.0, seed=seeds, batch_size=size
            )
            for size in (None, 2)
        )
    assert batched.token_ids == whole.token_ids
    torch.testing.assert_close(batched.embedding, whole.embedding, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_cache_path_equals_encoding_the_whole_text_again(
    backbone: Backbone, pooler: Pooler, items: list[Item]
) -> None:
    paths = run(backbone, pooler, items, BUDGETS, temperature=1.0, seed=1)
    think, end, emb = (backbone.token_id(token) for token in (THINK, END_THINK, EMB))
    # A tokenizer would split the text of random weights in another way, so the same ids are put after the prompt.
    for row, item in enumerate(items):
        inputs = backbone.prepare([item], embed=False)
        rest = [think, *paths.token_ids[row], end, emb] if BUDGETS[row] else [emb]
        width = len(rest)
        ids = torch.tensor([rest])
        tensors = dict(inputs.tensors)
        positions = tensors["position_ids"]
        after = positions.amax(dim=(0, -1) if positions.ndim == 3 else -1)[:, None] + 1 + torch.arange(width)
        after = after.expand(3, 1, width) if positions.ndim == 3 else after
        tensors["position_ids"] = torch.cat([positions, after], dim=-1)
        tensors["attention_mask"] = torch.ones(1, tensors["input_ids"].shape[1] + width, dtype=torch.int64)
        tensors["input_ids"] = torch.cat([tensors["input_ids"], ids], dim=1)
        inputs.tensors = tensors
        with torch.no_grad():
            again = pooler(
                backbone(inputs), tensors["attention_mask"], torch.tensor([tensors["input_ids"].shape[1] - 1])
            )
        torch.testing.assert_close(again[0], paths.embedding[row], atol=TOLERANCE, rtol=TOLERANCE)


def test_rollouts_agree_with_a_pass_with_gradients(backbone: Backbone, pooler: Pooler, items: list[Item]) -> None:
    drawn = rollout(
        Model(backbone, pooler),
        items,
        group_size=3,
        temperature=0.8,
        max_new_tokens=5,
        seed=2,
        exploration=1.0,
        batch_size=6,
    )
    assert 0 < drawn.think.sum() < len(drawn)
    prefix = backbone.prefill(backbone.prepare(items, embed=False))
    rest = rollout_tokens(backbone, drawn)
    states, _ = backbone.extend(backbone.fork(prefix, torch.arange(15) // 3), rest.tokens, rest.mask)
    mask = drawn.token_mask
    picked = states[:, : mask.shape[1]][mask]
    again = token_log_probs(backbone, picked, drawn.token_ids[mask], temperature=0.8)
    torch.testing.assert_close(again, drawn.log_prob[mask], atol=TOLERANCE, rtol=TOLERANCE)
    again.sum().backward()
    assert any(parameter.grad is not None for parameter in backbone.parameters())
    backbone.zero_grad()
    embedded = pooler(states[torch.arange(15), rest.emb_column][:, None], torch.ones(15, 1), torch.zeros(15).long())
    torch.testing.assert_close(embedded.detach(), drawn.embedding, atol=TOLERANCE, rtol=TOLERANCE)
