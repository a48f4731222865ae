"""Tests decoding with the bundled model and random weights. A batch mixes texts, pictures and scenes."""

from __future__ import annotations

import pytest
import torch

from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.inference.adaptive import adaptive_paths, sample
from mmemb.inference.encoder import Encoder, evaluating
from mmemb.interfaces import Backbone, Controller, Model, SetupContext
from mmemb.registry import create
from mmemb.types import Decision, Image, Item, PrefillState, Text


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create("backbone", "tiny", weights="random", seed=3)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    from mmemb.data.bundled import evaluation_tasks

    tasks = evaluation_tasks("validation", tasks=["name", "fact", "left1"])
    return [task.queries[row].query for row in range(3) for task in tasks]


class Every(Controller):
    """Reasons for every second row."""

    def decide(self, state: PrefillState) -> Decision:
        think = torch.arange(len(state.direct)) % 2 == 0
        return Decision(think, think.float(), torch.where(think, 12, 0))


@pytest.mark.parametrize("name", ["embed_token", "last_token", "mean", "attention"])
def test_cache_and_plain_encoding_agree(
    backbone: Backbone, items: list[Item], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tokenizer would split the bytes that random weights write in another way. Words give the same tokens again.
    words = backbone.prepare([items[0]], rationales=["the currency of chile is the chilean peso"])
    allowed = torch.zeros(backbone.logits(torch.zeros(1, backbone.hidden_size)).shape[-1], dtype=torch.bool)
    allowed[words.labels[0][words.labels[0] >= 0]] = True
    logits = type(backbone).logits
    monkeypatch.setattr(
        type(backbone), "logits", lambda self, hidden: logits(self, hidden).masked_fill(~allowed, -torch.inf)
    )
    pooler = create("pooler", name)
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    with evaluating(backbone, pooler):
        paths = adaptive_paths(Model(backbone, pooler), items, Every(), budget=12, temperature=1.0, seed=1)
    texts = [text if tokens else None for text, tokens in zip(paths.rationale, paths.tokens.tolist(), strict=True)]
    assert [len(ids) for ids in paths.token_ids] == [backbone.count_tokens(text or "") for text in texts]
    assert len({len(ids) for ids in paths.token_ids}) > 2
    encoder = Encoder(backbone, pooler, batch_size=4)
    torch.testing.assert_close(paths.embedding, encoder.encode_queries(items, texts), atol=1e-4, rtol=0)
    torch.testing.assert_close(paths.state.direct, encoder.encode_queries(items), atol=1e-4, rtol=0)


def test_rows_do_not_depend_on_other_rows(backbone: Backbone, items: list[Item]) -> None:
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    one, many = Encoder(backbone, pooler, batch_size=1, budget=6), Encoder(backbone, pooler, batch_size=9, budget=6)
    alone, together = one.encode_paths(items), many.encode_paths(items)
    assert alone.token_ids == together.token_ids
    torch.testing.assert_close(alone.embedding, together.embedding, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.state.decision_logits, together.state.decision_logits, atol=1e-4, rtol=0)


def test_samples_do_not_depend_on_the_batch_size(backbone: Backbone, items: list[Item]) -> None:
    with evaluating(backbone):
        one, many = (
            sample(backbone, items * 2, max_new_tokens=5, temperature=1.0, seed=2, batch_size=size) for size in (1, 7)
        )
    assert one == many
    assert len({each.text for each in one}) > len(items)


def test_an_item_may_have_several_pictures(backbone: Backbone, items: list[Item]) -> None:
    picture = next(part for item in items for part in item.parts if isinstance(part, Image))
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    both = Item("what is shown", (picture, Text("and"), picture))
    out = Encoder(backbone, pooler, budget=4).encode([both, items[1]], AlwaysReason(4))
    assert out.embedding.norm(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
