"""The retrieval evaluator computes its formula, row by row, whatever the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.components.evaluators import retrieval
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.data.bundled import load_pairs
from mmemb.inference.embedder import Embedder
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Evaluator
from mmemb.registry import available, create
from mmemb.types import Item, Pair, Text
from tests.inference.fakes import WORDS, FakeBackbone, FakePooler


def make_pairs(count: int, *, tasks: int = 2) -> list[Pair]:
    """Pairs whose targets repeat: two pairs in three share one."""
    return [
        Pair(
            id=f"p{number}",
            task=f"task-{number % tasks}",
            query=Item("what is", (Text(" ".join(WORDS[number % 7 : number % 7 + 3])),)),
            positive=Item("", (Text(" ".join(WORDS[number // 3 % 12 : number // 3 % 12 + 2])),)),
            positive_id=f"t{number // 3 % 12}",
        )
        for number in range(count)
    ]


def model() -> tuple[FakeBackbone, FakePooler]:
    pooler = FakePooler()
    pooler.build(16)
    return FakeBackbone(seed=1), pooler


def bound(**options: Any) -> RetrievalEvaluator:
    evaluator = RetrievalEvaluator(**options)
    evaluator.bind(*model())
    return evaluator


RATIONALES = ("chile peso", None, "peru lima sol", "red")


@pytest.fixture(params=available("evaluator"))
def evaluator(request: pytest.FixtureRequest) -> Evaluator:
    made = create("evaluator", request.param)
    assert isinstance(made, Evaluator)
    if hasattr(made, "bind"):
        made.bind(*model())
    return made


def rows(pairs: Sequence[Pair]) -> list[str | None]:
    return [RATIONALES[number % 4] for number in range(len(pairs))]


def test_every_evaluator_scores_a_row_whatever_the_others(evaluator: Evaluator) -> None:
    pairs = make_pairs(40)
    evaluator.prepare_bank(pairs)
    whole = evaluator.score(pairs, rows(pairs))
    assert len(whole) == 40
    assert all(math.isfinite(value) and value <= 0 for value in whole)
    alone = [evaluator.score([pair], [text])[0] for pair, text in zip(pairs, rows(pairs), strict=True)]
    assert alone == pytest.approx(whole, abs=1e-4)
    assert len({round(value, 6) for value in whole}) > 10
    assert evaluator.score([], []) == []


def test_every_evaluator_hears_the_rationale(evaluator: Evaluator) -> None:
    pairs = make_pairs(12)
    evaluator.prepare_bank(pairs)
    assert evaluator.score(pairs, ["red apple"] * 12) != evaluator.score(pairs, [None] * 12)


def test_every_evaluator_has_settings_for_the_hash(evaluator: Evaluator) -> None:
    assert json.loads(json.dumps(evaluator.settings)) == evaluator.settings


def test_retrieval_is_the_log_softmax_of_the_true_target_among_other_targets_of_the_task() -> None:
    pairs = make_pairs(40)
    evaluator = bound(temperature=0.2)
    evaluator.prepare_bank(pairs)
    encoder = Encoder(*model())
    found = evaluator.score(pairs, rows(pairs))
    for pair, text, value in zip(pairs, rows(pairs), found, strict=True):
        others = {p.positive_id: p.positive for p in pairs if p.task == pair.task and p.positive_id != pair.positive_id}
        query = encoder.encode_queries([pair.query], [text])[0]
        cosines = encoder.encode_targets([pair.positive, *others.values()]) @ query
        assert value == pytest.approx((cosines / 0.2).log_softmax(0)[0].item(), abs=1e-4)


@pytest.mark.parametrize("negatives", [1, 3, 5])
def test_retrieval_compares_with_equally_many_negatives_everywhere(negatives: int) -> None:
    class Alike:
        """Every embedding is the same, so that a score is minus the log of the number of targets."""

        def encode_queries(self, items: Sequence[Item], rationales: object = None) -> Tensor:
            return torch.eye(4)[torch.zeros(len(items), dtype=torch.int64)]

        encode_targets = encode_queries

    pairs = make_pairs(36)
    evaluator = RetrievalEvaluator(negatives=negatives)
    evaluator._encoder = Alike()  # type: ignore[assignment]
    evaluator.prepare_bank(pairs)
    assert evaluator.score(pairs, [None] * 36) == pytest.approx([-math.log(1 + negatives)] * 36)


def test_retrieval_draws_negatives_by_its_seed_alone() -> None:
    pairs = make_pairs(36)
    evaluators = [bound(negatives=3), bound(negatives=3), bound(negatives=3, seed=1)]
    for evaluator, bank in zip(evaluators, (pairs, pairs[::-1], pairs), strict=True):
        evaluator.prepare_bank(bank)
    one, reordered, other = (evaluator.score(pairs, [None] * 36) for evaluator in evaluators)
    assert one == pytest.approx(reordered, abs=1e-5)
    assert one != pytest.approx(other, abs=1e-2)


def test_retrieval_embeds_the_bank_once() -> None:
    pairs = make_pairs(36)
    backbone, pooler = model()
    evaluator = RetrievalEvaluator()
    evaluator.bind(backbone, pooler)
    evaluator.prepare_bank(pairs)
    evaluator.score(pairs[:2], [None, None])
    before = len(backbone.calls)
    evaluator.score(pairs[:2], [None, None])
    assert len(backbone.calls) - before == 1  # the queries alone


def test_retrieval_forgets_embeddings_of_another_model() -> None:
    pairs = make_pairs(36)
    evaluator = bound()
    evaluator.prepare_bank(pairs)
    first = evaluator.score(pairs, [None] * 36)
    pooler = FakePooler()
    pooler.build(16)
    evaluator.bind(FakeBackbone(seed=2), pooler)
    second = evaluator.score(pairs, [None] * 36)
    fresh = RetrievalEvaluator()
    fresh.bind(FakeBackbone(seed=2), pooler)
    fresh.prepare_bank(pairs)
    assert second == fresh.score(pairs, [None] * 36) != first


def test_a_task_with_one_target_is_pointed_out_and_scores_zero() -> None:
    pairs = make_pairs(3, tasks=1)
    evaluator = bound()
    with pytest.warns(UserWarning, match="the task 'task-0' has one target only"):
        evaluator.prepare_bank(pairs)
    assert evaluator.score(pairs, [None] * 3) == pytest.approx([0.0] * 3)


def test_a_task_without_a_bank_is_named() -> None:
    evaluator = bound()
    evaluator.prepare_bank(make_pairs(8))
    with pytest.raises(ValueError, match="no negatives for the task 'task-2', only for: task-0, task-1"):
        evaluator.score(make_pairs(9, tasks=3), [None] * 9)


def test_an_evaluator_without_a_model_says_so() -> None:
    with pytest.raises(ValueError, match=r"no embedder; pass embedder= or bind\(backbone, pooler\) first"):
        _ = RetrievalEvaluator().settings


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"negatives": 0}])
def test_settings_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both must be positive"):
        RetrievalEvaluator(**options)


def test_an_embedder_of_its_own_is_loaded_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, dict[str, Any]]] = []
    backbone, pooler = model()

    def create(kind: str, name: str, **arguments: Any) -> Any:
        loaded.append((name, arguments))
        return backbone if kind == "backbone" else pooler

    monkeypatch.setattr(retrieval, "create", create)
    evaluator = RetrievalEvaluator("some/folder")
    evaluator.bind(FakeBackbone(seed=9), pooler)
    pairs = make_pairs(20)
    evaluator.prepare_bank(pairs)
    scores = evaluator.score(pairs, [None] * 20)
    assert loaded == [("transformers", {"model": "some/folder"}), ("embed_token", {})]
    expected = bound()
    expected.prepare_bank(pairs)
    assert scores == pytest.approx(expected.score(pairs, [None] * 20))
    assert evaluator.settings == expected.settings


def test_a_saved_embedder_scores_as_the_model_it_was_saved_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone, pooler = create("backbone", "tiny", weights="random"), create("pooler", "embed_token")
    pooler.build(backbone.hidden_size)
    folder = Embedder(backbone, pooler).save(tmp_path / "embedder")
    pairs = load_pairs("train", tasks=["fact"])[:4]
    bound, loaded = RetrievalEvaluator(), RetrievalEvaluator(str(folder))
    bound.bind(backbone, pooler)
    for evaluator in (bound, loaded):
        evaluator.prepare_bank(pairs)
    texts = [None, "chile", None, "peso"]
    assert loaded.score(pairs, texts) == pytest.approx(bound.score(pairs, texts), abs=1e-4)
