"""Tests that the plausible evaluator subtracts what its formula says, and nothing from a plausible text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from mmemb.components.evaluators.plausible import PlausibleEvaluator
from mmemb.data.bundled import load_pairs
from mmemb.inference.shared_prompts import log_likelihoods
from mmemb.interfaces import Evaluator, Model, SetupContext
from mmemb.registry import create
from mmemb.types import END_THINK, THINK, Image, Item, Pair, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakePooler


class Fixed(Evaluator):
    """Scores every text with 5 nats and no text with 3; ``told`` lists the calls that it got."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def setup(self, context: SetupContext) -> None:
        self.told.append(f"setup with {len(context.pairs)} pairs" if context.pairs else "setup with a model")

    def release(self) -> None:
        self.told.append("release")

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        return [3.0 if text is None else 5.0 for text in rationales]

    settings = {}  # type: ignore[assignment]


def make_pairs(count: int, *, task: str = "t", targets: int = 1000) -> list[Pair]:
    queries = (Item("what is", (Text(f"{a} {b}"),)) for a, b in itertools.permutations(WORDS[:8], 2))
    return [
        Pair(f"{task}{number}", task, query, Item("", (Text("red"),)), f"target-{number % targets}")
        for number, query in zip(range(count), queries, strict=False)
    ]


def bound(pairs: Sequence[Pair], **options: int) -> tuple[PlausibleEvaluator, FakeBackbone]:
    evaluator, backbone = PlausibleEvaluator(Fixed(), **options), FakeBackbone(seed=1)
    evaluator.setup(SetupContext(model=Model(backbone, FakePooler())))
    evaluator.setup(SetupContext(pairs=pairs))
    return evaluator, backbone


def nats(backbone: FakeBackbone, item: Item, text: str) -> float:
    """log p of a rationale and its end, by one plain forward pass."""
    ids = backbone.prepare([item], rationales=[text], embed=False)
    tokens = ids.tensors["input_ids"][0]
    start = int((tokens == backbone.token_id(THINK)).nonzero()[0, 0])
    with torch.no_grad():
        log_p = backbone.logits(backbone(ids)[0]).log_softmax(-1)
    return float(sum(log_p[at - 1, tokens[at]] for at in range(start + 1, len(tokens))))


def test_likelihoods_are_those_of_a_plain_forward_pass() -> None:
    backbone = FakeBackbone(seed=1)
    items = [pair.query for pair in make_pairs(3)]
    rows = [(item, text) for text in ("red", "chile peso lima", "blue dog") for item in items]
    think, end = backbone.token_id(THINK), backbone.token_id(END_THINK)
    tokens = [[think, *backbone.tokenize(text), end] for _, text in rows]
    found = log_likelihoods(backbone, [item for item, _ in rows], tokens, batch_size=4)
    assert found == pytest.approx([nats(backbone, item, text) for item, text in rows], abs=1e-4)
    assert log_likelihoods(backbone, items[:1], [[think]], batch_size=4) == [0.0]


def test_the_advantage_of_other_orders_and_other_queries_is_subtracted() -> None:
    pairs = make_pairs(4)
    evaluator, backbone = bound(pairs)
    pair, words = pairs[0], "chile peso lima"
    for text in map(" ".join, itertools.permutations(words.split())):
        orders = [" ".join(order) for order in itertools.permutations(words.split())]
        by_order = max(nats(backbone, pair.query, order) for order in orders) - nats(backbone, pair.query, text)
        by_query = max(nats(backbone, other.query, text) for other in pairs) - nats(backbone, pair.query, text)
        expected = 5.0 - by_order - by_query  # the maximum includes the text itself, so never below 0
        assert evaluator.score([pair], [text]) == pytest.approx([expected], abs=1e-4)
    assert evaluator.score([pair], [None]) == [3.0]


def test_queries_with_the_same_target_or_content_are_not_alternatives() -> None:
    pairs = make_pairs(6, targets=1)
    pairs += [Pair("again", "t", pairs[0].query, Item("", (Text("blue"),)), "elsewhere")]
    evaluator, _ = bound(pairs)
    assert evaluator._other_queries(pairs[0]) == []
    assert evaluator.score(pairs[:1], ["red"]) == [5.0]  # one word and no other query, so nothing to compare


@pytest.mark.parametrize("name", ["again", "zzz"])  # before and after the others in the order of ids
def test_a_query_with_several_targets_is_not_an_alternative_for_any_of_them(name: str) -> None:
    pairs = make_pairs(2)
    also = Pair(name, "t", pairs[0].query, Item("", (Text("blue"),)), pairs[1].positive_id)
    evaluator, _ = bound([*pairs, also])
    assert evaluator._other_queries(pairs[1]) == []


def test_pictures_whose_paths_end_alike_are_different_queries() -> None:
    pairs = [
        Pair(f"p{row}", "t", Item("what is", (Image(f"/data/row{row}/img/0.png"),)), Item("", (Text("red"),)), f"{row}")
        for row in range(6)
    ]
    evaluator, _ = bound(pairs)
    assert evaluator._other_queries(pairs[0]) == [pair.query for pair in pairs[1:]]


def test_the_wrapped_evaluator_gets_every_call() -> None:
    evaluator, _ = bound(make_pairs(3))
    evaluator.release()
    assert evaluator.evaluator.told == ["setup with a model", "setup with 3 pairs", "release"]  # type: ignore[attr-defined]


def test_a_likelihood_that_is_not_finite_is_an_error() -> None:
    evaluator, backbone = bound(make_pairs(3))
    torch.nn.init.constant_(backbone.head.bias, torch.nan)
    with pytest.raises(ValueError, match="fake gives a likelihood that is not finite"):
        evaluator.score(make_pairs(3), ["red"] * 3)


def test_two_words_pass_as_often_as_they_have_orders() -> None:
    pairs = make_pairs(2, targets=1)
    evaluator, _ = bound(pairs)
    texts = [" ".join(order) for order in itertools.permutations(WORDS, 2)]  # each text and its other order
    assert sum(score == 5.0 for score in evaluator.score(pairs[:1] * len(texts), texts)) == len(texts) / 2


def test_random_order_passes_with_the_documented_probability() -> None:
    pairs = make_pairs(2, targets=1)
    evaluator, _ = bound(pairs, alternatives=3)
    draw = random.Random(0)
    texts = [" ".join(draw.sample(WORDS[4:], 5)) for _ in range(400)]
    passed = sum(score == 5.0 for score in evaluator.score(pairs[:1] * 400, texts)) / 400
    assert passed == pytest.approx(1 / 4, abs=0.07)


def test_a_text_of_another_query_passes_with_the_documented_probability() -> None:
    pairs = make_pairs(50)
    evaluator, _ = bound(pairs, alternatives=4)
    draw = random.Random(0)
    texts = [draw.choice(WORDS) for _ in pairs]
    passed = sum(score == 5.0 for score in evaluator.score(pairs, texts)) / 50
    assert 0.06 <= passed <= 0.32  # 1/5 of 50, give or take two standard deviations


def test_alternatives_depend_on_the_seed_and_not_on_the_order_of_the_data() -> None:
    pairs = make_pairs(40)
    one, _ = bound(pairs, alternatives=2)
    reordered, _ = bound(pairs[::-1], alternatives=2)
    other, _ = bound(pairs, alternatives=2, seed=1)
    texts = ["chile peso lima red"] * 40
    assert one.score(pairs, texts) == pytest.approx(reordered.score(pairs, texts), abs=1e-5)
    assert one.score(pairs, texts) != pytest.approx(other.score(pairs, texts), abs=1e-2)
    assert one.settings != other.settings


def test_a_rationale_above_the_limit_is_cut_before_it_is_compared() -> None:
    pairs = make_pairs(3)
    evaluator = PlausibleEvaluator(Fixed())
    evaluator.setup(SetupContext(model=Model(FakeBackbone(seed=1, max_rationale_tokens=3), FakePooler())))
    evaluator.setup(SetupContext(pairs=pairs))
    assert evaluator.score(pairs, ["chile peso lima red red"] * 3) == evaluator.score(pairs, ["chile peso lima"] * 3)


def test_a_text_is_scored_once_per_call() -> None:
    pairs = make_pairs(3)
    evaluator, backbone = bound(pairs)
    counts = []
    for times in (1, 3):
        before = backbone.cells
        evaluator.score(pairs * times, ["chile peso"] * 3 * times)
        counts.append(backbone.cells - before)
    assert counts[0] == counts[1]


def test_error_messages_name_the_mistake() -> None:
    with pytest.raises(ValueError, match=r"evaluators\.plausible\.alternatives is 0; give 1 or more"):
        PlausibleEvaluator(Fixed(), alternatives=0)
    with pytest.raises(ValueError, match=r"no writer; pass writer=, or call setup with the model"):
        _ = PlausibleEvaluator(Fixed()).settings
    evaluator, _ = bound(make_pairs(3))
    with pytest.raises(ValueError, match="no other queries for the task 'u', only for: t"):
        evaluator.score(make_pairs(1, task="u"), ["red"])


def test_a_separate_writer_is_loaded_when_needed_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded:
        backbone = FakeBackbone(seed=7)

    asked: list[str] = []

    def load(model: str, batch_size: int) -> type[Loaded]:
        asked.append(model)
        return Loaded

    monkeypatch.setattr("mmemb.components.evaluators.plausible.load_encoder", load)
    pairs = make_pairs(3)
    evaluator = PlausibleEvaluator(Fixed(), writer="some/run")
    evaluator.setup(SetupContext(model=Model(FakeBackbone(seed=1), FakePooler())))
    evaluator.setup(SetupContext(pairs=pairs))
    first = evaluator.score(pairs, ["chile peso lima"] * 3)
    evaluator.release()
    assert evaluator.score(pairs, ["chile peso lima"] * 3) == first
    assert asked == ["some/run", "some/run"]
    assert first != bound(pairs)[0].score(pairs, ["chile peso lima"] * 3)


def test_it_works_with_the_bundled_model() -> None:
    """With mixed lengths, pictures and a real cache, a row has the same score alone and in a batch."""
    pairs = load_pairs("train", tasks=["flagattr", "left1"])
    some = pairs[:2] + pairs[-2:]
    evaluator = PlausibleEvaluator(Fixed(), alternatives=3)
    evaluator.setup(SetupContext(model=Model(create("backbone", "tiny"), create("pooler", "embed_token"))))
    evaluator.setup(SetupContext(pairs=some))
    texts = ["chile ; region : south america", "a dog , a cat : a dog", "x", "the cat , the dog"]
    together = evaluator.score(some, texts)
    alone = [evaluator.score([pair], [text])[0] for pair, text in zip(some, texts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-3)
