"""Tests of adaptive decoding: the cache path equals encoding again, rows are independent, and budgets hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.inference.adaptive import AdaptivePaths, adaptive_paths, confidence_over, sample
from mmemb.inference.prompts import length_order
from mmemb.interfaces import Backbone, Controller, Model, Pooler, SetupContext
from mmemb.types import EMB, END_THINK, THINK, Decision, Image, Item, PrefillState, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakeMeanPooler, FakePooler


def items(count: int = 11) -> list[Item]:
    return [Item("what is", (Text(" ".join(WORDS[i % 7 : i % 7 + 1 + i])),)) for i in range(count)]


class Rows(Controller):
    """Reasons for the given rows, each with its own budget, and records the state that it received."""

    def __init__(self, budgets: dict[int, int]) -> None:
        self.budgets = budgets

    def decide(self, state: PrefillState) -> Decision:
        self.seen = state
        budget = torch.tensor([self.budgets.get(row, 0) for row in range(len(state.direct))])
        return Decision(budget > 0, (budget > 0).float(), budget)


def built(pooler: Pooler) -> Pooler:
    pooler.setup(SetupContext(hidden_size=16))
    return pooler


@pytest.mark.parametrize("pooler", [FakePooler(), FakeMeanPooler()], ids=["emb", "mean"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_paths_equal_encoding_the_whole_text_again(pooler: Pooler, temperature: float) -> None:
    backbone, pooler, queries = FakeBackbone(), built(pooler), items()
    thinkers = {0: 9, 3: 4, 4: 1, 9: 7}
    paths = adaptive_paths(Model(backbone, pooler), queries, Rows(thinkers), budget=48, temperature=temperature, seed=3)
    out = paths.encoded()
    texts = [text if thought else None for text, thought in zip(out.rationale, out.thought.tolist(), strict=True)]
    inputs = backbone.prepare(queries, rationales=texts)
    again = pooler(backbone(inputs), inputs.tensors["attention_mask"], inputs.emb_position)
    torch.testing.assert_close(out.embedding, again, atol=1e-4, rtol=0)
    assert out.thought.nonzero().flatten().tolist() == sorted(thinkers)
    assert [count > 0 for count in out.tokens.tolist()] == [row in thinkers for row in range(len(queries))]
    assert "".join(out.rationale) != ""


def test_the_prompt_is_encoded_once_and_only_rows_that_reason_continue() -> None:
    backbone, queries = FakeBackbone(), items()
    out = adaptive_paths(Model(backbone, built(FakePooler())), queries, Rows({2: 3, 7: 3}), budget=48)
    assert Counter(backbone.calls)["prefill"] == 1
    assert Counter(backbone.calls)["forward"] == 0
    prompt = backbone.prepare(queries, embed=False).tensors["input_ids"].numel()
    most = prompt + len(queries) + 2 * (1 + 3 + 2)
    assert backbone.cells <= most
    assert out.tokens.tolist() == [5 if row in (2, 7) else 0 for row in range(len(queries))]


def test_a_rationale_that_its_budget_ends_is_marked_as_truncated() -> None:
    backbone = FakeBackbone()
    with torch.no_grad():
        backbone.head.bias[backbone.token_id(END_THINK)] = -100.0
    paths = adaptive_paths(Model(backbone, built(FakePooler())), items(3), Rows({0: 2, 1: 5, 2: 30}), budget=6)
    # The counts include <think> and </think>. The encoder's budget of 6 limits the third.
    assert paths.tokens.tolist() == [4, 7, 8]
    assert paths.truncated.tolist() == [True, True, True]
    assert paths.decision.budget.tolist() == [2, 5, 6]


def test_a_rationale_that_closes_exactly_at_its_budget_is_not_truncated() -> None:
    backbone = FakeBackbone()
    with torch.no_grad():
        backbone.head.bias[backbone.token_id(END_THINK)] = 100.0
    paths = adaptive_paths(Model(backbone, built(FakePooler())), items(2), AlwaysReason(1), budget=48)
    assert paths.tokens.tolist() == [2, 2]
    assert paths.truncated.tolist() == [False, False]
    assert paths.token_ids == [(), ()]


def test_the_limit_of_the_backbone_applies_to_every_budget() -> None:
    backbone = FakeBackbone(max_rationale_tokens=3)
    with torch.no_grad():
        backbone.head.bias[backbone.token_id(END_THINK)] = -100.0
    assert adaptive_paths(
        Model(backbone, built(FakePooler())), items(2), AlwaysReason(9), budget=9
    ).tokens.tolist() == [5, 5]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_other_rows(temperature: float) -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakePooler()), items()
    seeds = list(range(50, 61))
    options = {"budget": 12, "temperature": temperature}
    together = adaptive_paths(Model(backbone, pooler), queries, AlwaysReason(12), seed=seeds, **options)
    assert len(set(together.tokens.tolist())) > 1, "rows must end at different steps to test compaction"
    for row in range(len(queries)):
        alone = adaptive_paths(Model(backbone, pooler), [queries[row]], AlwaysReason(12), seed=[seeds[row]], **options)
        assert alone.token_ids[0] == together.token_ids[row]
        torch.testing.assert_close(alone.embedding[0], together.embedding[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.state.direct[0], together.state.direct[row], atol=1e-5, rtol=0)


class InTurn(Controller):
    """Gives each row the next budget of a list. A budget of 0 skips reasoning."""

    def __init__(self, *budgets: int) -> None:
        self.budgets = list(budgets)

    def decide(self, state: PrefillState) -> Decision:
        budget = torch.tensor([self.budgets.pop(0) for _ in state.direct])
        return Decision(budget > 0, (budget > 0).float(), budget)


@pytest.mark.parametrize("pooler", [FakePooler(), FakeMeanPooler()], ids=["emb", "mean"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_last_rows_of_a_batch_continue_with_the_next_batch(
    pooler: Pooler, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, pooler, queries = FakeBackbone(), built(pooler), items()
    budgets = (1, 12, 0, 11, 2, 2, 9, 0, 1, 7, 3)
    with torch.no_grad():
        backbone.head.bias[backbone.token_id(END_THINK)] = -2.0

    def paths(size: int | None, reached: Callable[[int], None] | None = None) -> AdaptivePaths:
        backbone.calls.clear()
        options = {"budget": 12, "temperature": temperature, "seed": list(range(50, 61))}
        return adaptive_paths(
            Model(backbone, pooler), queries, InTurn(*budgets), batch_size=size, reached=reached, **options
        )

    whole, seen = paths(None), []
    batched = paths(4, seen.append)
    joined = Counter(backbone.calls)
    assert seen == [4, 8, 11]
    assert joined["prefill"] == 3
    assert joined["join"] >= 1
    monkeypatch.setattr(FakeBackbone, "joins_prefixes", False)
    apart = paths(4)
    assert Counter(backbone.calls)["join"] == 0
    assert Counter(backbone.calls)["extend"] > joined["extend"], "waiting for every batch should take more steps"
    for other in (batched, apart):
        assert other.token_ids == whole.token_ids
        assert other.rationale == whole.rationale
        for name in ("tokens", "truncated"):
            assert torch.equal(getattr(other, name), getattr(whole, name))
        torch.testing.assert_close(other.embedding, whole.embedding, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.state.direct, whole.state.direct, atol=1e-5, rtol=0)


def test_a_backbone_that_does_not_join_prefixes_raises() -> None:
    backbone = FakeBackbone()
    prefix = backbone.prefill(backbone.prepare(items(2), embed=False))
    assert not Backbone.joins_prefixes.fget(backbone)
    with pytest.raises(NotImplementedError, match="FakeBackbone does not join prefixes"):
        Backbone.join(backbone, [prefix, prefix])


def test_the_controller_receives_decision_logits_and_confidence() -> None:
    backbone, pooler, queries = FakeBackbone(), built(FakePooler()), items(4)
    bank = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    controller = Rows({})
    adaptive_paths(Model(backbone, pooler), queries, controller, budget=4, bank=bank, confidence_temperature=0.1)
    prefix = backbone.prefill(backbone.prepare(queries, embed=False))
    both = backbone.logits(prefix.hidden)[:, [backbone.token_id(THINK), backbone.token_id(EMB)]]
    torch.testing.assert_close(controller.seen.decision_logits, both)
    expected = torch.softmax(controller.seen.direct @ bank.T / 0.1, dim=1).max(dim=1).values
    torch.testing.assert_close(controller.seen.confidence, expected)


def test_confidence_of_an_even_bank_is_one_over_its_size() -> None:
    direct = torch.tensor([[1.0, 0.0]])
    assert confidence_over(direct, torch.tensor([[0.0, 1.0]] * 4), temperature=0.05).item() == pytest.approx(0.25)


def test_samples_depend_on_the_seed_and_not_on_the_batch_size() -> None:
    backbone, queries = FakeBackbone(), items()
    options = {"max_new_tokens": 10, "temperature": 1.0}
    one = sample(backbone, queries, seed=5, batch_size=1, **options)
    many = sample(backbone, queries, seed=5, batch_size=4, **options)
    other = sample(backbone, queries, seed=6, batch_size=4, **options)
    assert one == many
    assert [each.text for each in one] != [each.text for each in other]
    for each in one:
        assert each.tokens == len(each.token_ids) <= 10
        assert each.text == backbone.decode(each.token_ids)
        assert each.finish_reason in {"stop", "length"}
    assert {each.finish_reason for each in one} == {"stop", "length"}


def test_samples_of_one_item_share_its_prefill_and_differ() -> None:
    backbone, item = FakeBackbone(), items(5)[4]
    prompt = len(backbone.prepare([item], embed=False).tensors["input_ids"][0])
    four = sample(backbone, [item] * 4, seed=[1, 2, 3, 4], max_new_tokens=1, temperature=1.0, batch_size=4)
    assert backbone.cells <= prompt + 4 * 2
    again = [
        sample(backbone, [item], seed=[s], max_new_tokens=1, temperature=1.0, batch_size=1)[0] for s in (1, 2, 3, 4)
    ]
    assert four == again


def test_greedy_takes_the_likeliest_token() -> None:
    backbone, queries = FakeBackbone(), items(3)
    written = sample(backbone, queries, max_new_tokens=4, temperature=0.0, seed=0, batch_size=8)
    banned = [backbone.token_id(THINK), backbone.token_id(EMB)]
    for item, each in zip(queries, written, strict=True):
        prefix = backbone.prefill(backbone.prepare([item], embed=False))
        token, ids = torch.tensor([[backbone.token_id(THINK)]]), []
        while len(ids) < 4:
            hidden, prefix = backbone.extend(prefix, token)
            logits = backbone.logits(hidden[0, -1])
            logits[banned] = -torch.inf
            token = logits.argmax().view(1, 1)
            if token.item() == backbone.token_id(END_THINK):
                break
            ids.append(token.item())
        assert each.token_ids == tuple(ids)


def test_sampled_tokens_follow_the_softmax() -> None:
    backbone, item = FakeBackbone(), items(1)[0]
    draws = sample(backbone, [item] * 4000, max_new_tokens=1, temperature=2.0, seed=0, batch_size=1000)
    hidden, _ = backbone.extend(
        backbone.prefill(backbone.prepare([item], embed=False)), torch.tensor([[backbone.token_id(THINK)]])
    )
    logits = backbone.logits(hidden[0, -1])
    logits[[backbone.token_id(THINK), backbone.token_id(EMB)]] = -torch.inf
    expected = (logits / 2.0).softmax(-1)
    expected[backbone.token_id(END_THINK)] += expected[0].item()  # the padding token ends a rationale too
    expected[0] = 0
    counts = torch.zeros(len(expected))
    for each in draws:
        counts[each.token_ids[0] if each.token_ids else backbone.token_id(END_THINK)] += 1
    # The standard error of a share over 4000 draws is at most 0.008.
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)


def test_sample_refuses_wrong_arguments() -> None:
    backbone = FakeBackbone()
    with pytest.raises(ValueError, match=r"sample\.temperature is -1"):
        sample(backbone, items(1), max_new_tokens=4, temperature=-1, seed=0, batch_size=1)
    with pytest.raises(ValueError, match="seed has length 2 for 1 items"):
        sample(backbone, items(1), max_new_tokens=4, temperature=1, seed=[1, 2], batch_size=1)


def test_length_order_puts_pictures_then_long_texts_first() -> None:
    short, long = Item("", (Text("a"),)), Item("", (Text("a" * 9),))
    picture = Item("", (Image("x.png"),))
    assert length_order([short, long, picture, short]) == [2, 1, 0, 3]
