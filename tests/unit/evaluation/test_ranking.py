"""Queries with candidates of their own are ranked among those only, in every number."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from mmemb.evaluation.ranking import Ranking
from mmemb.types import EvaluationTask, Item, Pair, Text

IDS = ("a", "b", "c", "d")


def item(text: str) -> Item:
    return Item("", (Text(text),))


def pair(positive: str, *others: str, alone: bool = True) -> Pair:
    negatives = tuple(item(other) for other in others)
    return Pair(f"{positive}?", "task", item("q"), item(positive), positive, negatives, others, alone)


def task(*queries: Pair) -> EvaluationTask:
    return EvaluationTask("task", queries, [item(identity) for identity in IDS], IDS)


def test_candidates_of_other_queries_do_not_count() -> None:
    candidates = torch.eye(4)
    embedding = normalize(torch.tensor([[0.5, 0.4, 0.9, 0.0], [0.5, 0.4, 0.9, 0.0]]), dim=1)
    ranking = Ranking.of(task(pair("a", "b", "d"), pair("a", alone=False)), candidates)
    assert ranking.counts.tolist() == [3, 4]
    assert ranking.hits(embedding).tolist() == [1.0, 0.0]
    (alone, among) = ranking.placed(embedding)
    assert alone == (1.0, 1.0, (0, 1, 3))
    assert among == (2.0, 0.0, (2, 0, 1))
    logits = embedding[0, [0, 1, 3]] / 0.1
    expected = logits.log_softmax(0)
    assert ranking.log_probability(embedding, temperature=0.1)[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert ranking.confidence(embedding, temperature=0.1)[0].item() == pytest.approx(expected[0].exp().item(), abs=1e-5)


def test_fewer_candidates_than_places_give_fewer_results() -> None:
    ranking = Ranking.of(task(pair("b", "d")), torch.eye(4))
    assert ranking.placed(torch.eye(4)[:1])[0] == (1.5, 0.5, (1, 3))
    assert not math.isnan(ranking.log_probability(torch.eye(4)[:1], temperature=0.05).item())


def test_errors_say_why_a_task_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="the positive 'z' of query 'z\\?' is not a candidate"):
        Ranking.of(task(pair("z")), torch.eye(4))
    with pytest.raises(ValueError, match="task task: the task has no queries"):
        Ranking.of(task(), torch.eye(4))
