"""Rewards, and the candidates that they are computed on, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmemb.registry import available
from mmemb.training.control.candidate_bank import CandidateBank
from mmemb.training.control.rewards import Format, Outcome, OverLength, Retrieval, Reward, Utility
from mmemb.types import EvaluationTask, Item, Pair, Text


def pair(task: str, positive: int) -> Pair:
    return Pair(f"{task}/{positive}", task, Item("", (Text("q"),)), Item("", (Text(str(positive)),)), f"id{positive}")


def outcome() -> Outcome:
    """Two queries. Two of three rollouts of the first query reason, and no rollout of the second does."""
    chance = torch.tensor([0.9, 0.5, 0.4, 0.2, 0.2, 0.2])
    return Outcome(
        pairs=[pair("a", 0), pair("a", 1)],
        query=torch.tensor([0, 0, 0, 1, 1, 1]),
        think=torch.tensor([True, True, False, False, False, False]),
        tokens=torch.tensor([10, 40, 0, 0, 0, 0]),
        truncated=torch.tensor([False, True, False, False, False, False]),
        rationale=["red", "blue", "", "", "", ""],
        log_probability=chance.log(),
        rank=torch.tensor([1.0, 2.0, 4.0, 5.0, 5.0, 5.0]),
        direct_log_probability=torch.tensor([0.4, 0.4, 0.4, 0.2, 0.2, 0.2]).log(),
        direct_rank=torch.tensor([4.0, 4.0, 4.0, 5.0, 5.0, 5.0]),
    )


def test_format_needs_words_and_a_closed_rationale() -> None:
    assert Format()(outcome()).tolist() == [1, 0, 1, 1, 1, 1]
    seen = outcome()
    wordless = Outcome(**{**vars(seen), "rationale": [" "] * 6})
    assert Format()(wordless).tolist() == [0, 0, 1, 1, 1, 1]


def test_retrieval_scores_the_rollouts_own_embedding() -> None:
    torch.testing.assert_close(Retrieval()(outcome()), outcome().log_probability.exp())
    assert Retrieval("reciprocal_rank")(outcome())[:3].tolist() == [1, 0.5, 0.25]
    torch.testing.assert_close(Retrieval("log_probability")(outcome()), outcome().log_probability)


def test_utility_subtracts_the_price_and_gives_direct_rollouts_the_counterpart() -> None:
    first, second = 0.5 - 10 * 0.01, 0.1 - 40 * 0.01
    expected = [first, second, -(first + second) / 2, 0, 0, 0]
    assert Utility(price=0.01)(outcome()).tolist() == pytest.approx(expected, abs=1e-6)


def test_over_length_falls_between_its_limits() -> None:
    assert OverLength(soft=20, hard=60)(outcome()).tolist() == [0, -0.5, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"OverLength\.hard is 9; give a number above 9"):
        OverLength(soft=9, hard=9)


def test_a_users_reward_is_named_by_its_class() -> None:
    class VeryBrief(Reward):
        def __call__(self, outcome: Outcome) -> Tensor:
            return -outcome.tokens.float()

    assert VeryBrief(weight=2.0).name == "very_brief"
    assert VeryBrief(weight=2.0).weight == 2.0
    assert OverLength().name == "over_length"


class Tables:
    """An encoder that looks up a vector for each text."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def encode_targets(self, items: list[Item]) -> Tensor:
        return torch.stack([self.vectors[int(item.text)] for item in items])


def bank(vectors: Tensor, *, size: int = 9) -> CandidateBank:
    """Task a has the candidates 0, 1 and 2, and task b has the others."""
    split = {"a": range(3), "b": range(3, len(vectors))}
    tasks = [
        EvaluationTask(name, [], [Item("", (Text(str(i)),)) for i in rows], [f"id{i}" for i in rows])
        for name, rows in split.items()
    ]
    made = CandidateBank(tasks, size=size)
    made.refresh(Tables(vectors))  # type: ignore[arg-type]
    return made


def test_rollouts_compete_with_their_own_tasks_candidates_only() -> None:
    vectors = torch.eye(5)
    pairs, fresh = [pair("a", 1), pair("b", 4)], vectors[[1, 4]]
    embedding = normalize(torch.tensor([[1.0, 1, 0, 0, 9], [0, 0, 0, 0, 1.0], [9.0, 0, 0, 2, 1]]), dim=1)
    query = torch.tensor([0, 1, 1])
    found, rank = bank(vectors).score(pairs, fresh, embedding, query, temperature=0.5)
    expected = []
    for row, (columns, own) in enumerate([((0, 1, 2), 1), ((3, 4), 4), ((3, 4), 4)]):
        logits = {column: math.exp(2 * float(embedding[row, column])) for column in columns}
        expected.append(math.log(logits[own] / sum(logits.values())))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert rank.tolist() == [1.5, 1, 2]  # a tie counts half


def test_a_positive_competes_once_with_its_current_embedding() -> None:
    vectors = torch.eye(5)
    fresh = vectors[[2]]  # since the refresh, the positive id1 has moved to the place of id2
    found, rank = bank(vectors).score([pair("a", 1)], fresh, vectors[[1]], torch.tensor([0]), temperature=1.0)
    assert found.item() == pytest.approx(-math.log(3))
    assert rank.item() == 2.0  # tied with the candidates 0 and 2


def test_a_bank_draws_its_candidates_and_restores_its_state() -> None:
    vectors = normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    small = bank(vectors, size=2)
    assert {task: len(value) for task, value in small.state()["embedded"].items()} == {"a": 2, "b": 2}
    other = bank(-vectors, size=2)
    other.load_state(small.state())
    arguments = ([pair("b", 5)], vectors[[5]], vectors[[7]], torch.tensor([0]))
    assert other.score(*arguments, temperature=0.1)[0] == small.score(*arguments, temperature=0.1)[0]
    with pytest.raises(ValueError, match="the checkpoint's candidates are"):
        bank(vectors).load_state(small.state())


def test_an_error_names_the_task_without_candidates() -> None:
    with pytest.raises(ValueError, match="no candidates for the task 'c', only for: a, b"):
        bank(torch.eye(5)).score([pair("c", 0)], torch.eye(5)[:1], torch.eye(5)[:1], torch.tensor([0]), temperature=1)
    with pytest.raises(ValueError, match="there are no tasks"):
        CandidateBank([], size=4)


def test_a_reward_without_a_short_name_is_logged_under_its_class_name() -> None:
    class LongUtility(Utility):
        """Utility under another name."""

    assert (Utility().name, LongUtility().name) == ("utility", "long_utility")
    assert "long_utility" not in available("reward")
