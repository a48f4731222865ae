"""Tests that the rival of the scoring benchmark computes the same scores without sharing a prompt."""

from __future__ import annotations

import pytest
import torch

from benchmarks import score
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.evaluators.judge import JudgeEvaluator
from mmemb.data.bundled import load_pairs
from mmemb.inference import shared_prompts as inference
from mmemb.inference.shared_prompts import continuation_states, last_states, log_likelihoods
from mmemb.interfaces import Backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return TinyBackbone(weights="random").eval()


def test_a_plain_pass_gives_the_states_of_a_shared_prompt(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [load_pairs("train", tasks=[task])[number].query for task in ("fact", "name", "left1") for number in (0, 1)]
    tokens = [[5 + row + column for column in range(1 + row % 3)] for row in range(6)]
    shared = last_states(backbone, items, tokens, batch_size=4)
    likely = log_likelihoods(backbone, items, tokens, batch_size=4)
    monkeypatch.setattr(inference, "continuation_states", score.plain_states)
    monkeypatch.setattr(backbone, "prefill", None)
    torch.testing.assert_close(last_states(backbone, items, tokens, batch_size=4), shared, atol=1e-4, rtol=1e-3)
    assert log_likelihoods(backbone, items, tokens, batch_size=4) == pytest.approx(likely, abs=1e-3)


def test_the_judges_rival_makes_no_cache(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no, *_ = (word for word in ("red", "apple", "dog", "left", "of") if len(backbone.tokenize(word)) == 1)
    evaluator = JudgeEvaluator(backbone, yes=yes, no=no)
    pair = load_pairs("train", tasks=["name"])[0]
    texts = [None, "red apple", "dog"]
    shared = evaluator.score([pair] * 3, texts)
    monkeypatch.setattr(backbone, "prefill", None)
    assert score.apart(evaluator, [pair] * 3, texts) == pytest.approx(shared, abs=1e-3)
    assert inference.continuation_states is continuation_states
