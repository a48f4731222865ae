"""Tests of rollouts: they keep what was drawn, encode prompts once, and give each group its share of decisions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mmemb.inference.encoder import Encoder
from mmemb.inference.rollout import SAMPLED, Rollouts, rollout, rollout_tokens, token_log_probs
from mmemb.interfaces import Backbone, Model, Pooler, SetupContext
from mmemb.types import Item, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakeMeanPooler, FakePooler


def items(count: int = 5) -> list[Item]:
    return [Item("what is", (Text(" ".join(WORDS[i % 7 : i % 7 + 1 + i])),)) for i in range(count)]


def built(pooler: Pooler, width: int = 16) -> Pooler:
    pooler.setup(SetupContext(hidden_size=width))
    return pooler


def sample(backbone: Backbone, pooler: Pooler, queries: list[Item], **options: object) -> Rollouts:
    settings = {"group_size": 4, "temperature": 1.0, "max_new_tokens": 6, "seed": 3} | options
    return rollout(Model(backbone, pooler), queries, **settings)  # type: ignore[arg-type]


def again(backbone: Backbone, queries: list[Item], drawn: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes log-probabilities [R, L] and states at ``<emb>`` [R, H] in one pass over prompts and continuations."""
    prefix = backbone.prefill(backbone.prepare(queries, embed=False))
    source = torch.arange(len(drawn)) // drawn.group_size
    rest = rollout_tokens(backbone, drawn)
    states, _ = backbone.extend(backbone.fork(prefix, source), rest.tokens, rest.mask)
    mask = drawn.token_mask
    log_prob = torch.zeros(mask.shape)
    picked = states[:, : mask.shape[1]][mask]
    log_prob[mask] = token_log_probs(backbone, picked, drawn.token_ids[mask], temperature=drawn.temperature)
    return log_prob, states[torch.arange(len(drawn)), rest.emb_column]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_over_the_rollouts_gives_their_log_probabilities_and_embeddings(temperature: float) -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakePooler()), items()
    drawn = sample(backbone, pooler, queries, temperature=temperature, exploration=0.6)
    assert 0 < drawn.think.sum() < len(drawn)
    assert 0 < drawn.truncated.sum() < drawn.think.sum(), "some rollouts should be truncated and some should not"
    log_prob, states = again(backbone, queries, drawn)
    torch.testing.assert_close(log_prob, drawn.log_prob, atol=1e-5, rtol=0)
    embedding = pooler(states[:, None], torch.ones(len(drawn), 1), torch.zeros(len(drawn), dtype=torch.int64))
    torch.testing.assert_close(embedding, drawn.embedding, atol=1e-5, rtol=0)
    assert states.requires_grad


def test_prompts_are_encoded_once_and_forked_for_the_rollouts_that_reason() -> None:
    backbone, queries = FakeBackbone(), items()
    prompts = backbone.prepare(queries, embed=False).tensors["input_ids"].numel()
    decision = torch.tensor([[1, 1, 0, 0]] * 5)
    drawn = sample(backbone, built(FakePooler()), queries, max_new_tokens=3, decision=decision)
    assert Counter(backbone.calls)["prefill"] == 1
    assert Counter(backbone.calls)["forward"] == 0
    assert backbone.cells <= prompts + len(queries) + 10 * (3 + 3)
    direct = drawn.direct.repeat_interleave(4, dim=0)
    torch.testing.assert_close(drawn.embedding[~drawn.think], direct[~drawn.think])
    assert (drawn.embedding - direct)[drawn.think].abs().amax(dim=1).min() > 0


def test_given_decisions_are_kept_and_have_no_log_probability() -> None:
    backbone, pooler = FakeBackbone(), built(FakePooler())
    decision = torch.tensor([[1, 0, SAMPLED, SAMPLED]] * 5)
    drawn = sample(backbone, pooler, items(), decision=decision)
    assert drawn.think.view(5, 4)[:, :2].tolist() == [[True, False]] * 5
    assert drawn.forced.view(5, 4).tolist() == [[True, True, False, False]] * 5
    assert (drawn.decision_log_prob.view(5, 4)[:, :2] == 0).all()
    free = drawn.decision_log_prob.view(5, 4)[:, 2:]
    probability = drawn.think_probability[:, None]
    expected = torch.where(drawn.think.view(5, 4)[:, 2:], probability, 1 - probability)
    torch.testing.assert_close(free.exp(), expected)
    boolean = sample(backbone, pooler, items(), decision=torch.ones(20, dtype=torch.bool))
    assert boolean.think.all()
    assert boolean.forced.all()


def test_every_group_has_its_share_of_decisions() -> None:
    backbone, pooler = FakeBackbone(), built(FakePooler())
    for seed in range(3):
        drawn = sample(backbone, pooler, items(), group_size=8, exploration=0.5, seed=seed, max_new_tokens=1)
        thinking = drawn.think.view(5, 8).sum(dim=1)
        torch.testing.assert_close(thinking.float(), 8 * drawn.think_probability, atol=1, rtol=0)
        assert (thinking >= 2).all()
        assert (thinking <= 6).all()
    own = ((drawn.decision_logits[:, 0] - drawn.decision_logits[:, 1]) / 1.0).sigmoid()
    torch.testing.assert_close(drawn.think_probability, 0.25 + 0.5 * own)


def test_decisions_have_the_right_probability_on_average() -> None:
    backbone, pooler, query = FakeBackbone(), built(FakePooler()), items(1)
    drawn = sample(backbone, pooler, query * 200, group_size=3, max_new_tokens=1, temperature=2.0)
    share, expected = drawn.think.float().view(200, 3).mean(dim=0), drawn.think_probability[0].expand(3)
    torch.testing.assert_close(share, expected, atol=0.12, rtol=0)  # 3.4 standard deviations of 200 draws


def test_the_rollouts_of_a_query_depend_only_on_its_seed() -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakePooler()), items()
    together = sample(backbone, pooler, queries, seed=[4, 5, 6, 7, 8])
    parts = sample(backbone, pooler, queries, seed=[4, 5, 6, 7, 8], batch_size=8)
    assert together.rationale == parts.rationale
    torch.testing.assert_close(together.log_prob, parts.log_prob, atol=1e-5, rtol=0)
    alone = sample(backbone, pooler, queries[2:3], seed=[6])
    assert alone.rationale == together.rationale[8:12]
    assert sample(backbone, pooler, queries, seed=1).rationale != together.rationale


def test_a_pooler_that_needs_all_states_works_too() -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakeMeanPooler()), items()
    drawn = sample(backbone, pooler, queries, decision=torch.ones(5, 4))
    texts = Encoder(backbone, pooler).encode_queries([query for query in queries for _ in range(4)], drawn.rationale)
    torch.testing.assert_close(drawn.embedding, texts, atol=1e-4, rtol=0)


def test_modes_are_restored_and_no_rollout_needs_to_reason() -> None:
    backbone, pooler = FakeBackbone().train(), built(FakePooler())
    drawn = sample(backbone, pooler, items(), decision=torch.zeros(5, 4))
    assert backbone.training
    assert drawn.token_ids.shape == (20, 0)
    assert rollout_tokens(backbone, drawn).tokens.tolist() == [[backbone.token_id("<emb>")]] * 20
    assert drawn.to("cpu").embedding.shape == (20, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"exploration": 1.5}, "exploration is 1.5"),
        ({"seed": [1]}, "seed has length 1 for 5 queries"),
        ({"decision": torch.ones(4, 5)}, r"decision has the shape \(4, 5\); give \(5, 4\)"),
        ({"decision": torch.full((5, 4), 2)}, "decision has other values than 1"),
    ],
)
def test_errors_name_wrong_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(FakeBackbone(), built(FakePooler()), items(), **options)
