"""Metrics compared with the mean over every order of the ties."""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mmemb.evaluation.metrics import (
    ExpectedHitRate,
    ExpectedReciprocalRank,
    cosine_scores,
    expected_hit,
    expected_rank,
    expected_reciprocal_rank,
    placement,
)


def brute_force(scores: list[float], positive: int, gain: Callable[[int], float]) -> float:
    """Mean gain over every permutation of the candidates that sorts by score."""
    gains = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            gains.append(gain(order.index(positive) + 1))
    return sum(gains) / len(gains)


ROWS = [
    [0.9, 0.1, 0.5, 0.3, 0.2],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    [0.7, 0.5, 0.5, 0.1, 0.5],
    [0.1, 0.1, 0.9, 0.9, 0.1],
    [0.2, 0.3, 0.2, 0.9, -1.0],
]


@pytest.mark.parametrize("positive", range(5))
def test_every_metric_is_the_mean_over_all_orders_of_the_ties(positive: int) -> None:
    scores, column = torch.tensor(ROWS), torch.full((5,), positive)
    for k in (1, 2, 3, 5):
        expected = [brute_force(row, positive, lambda rank, k=k: float(rank <= k)) for row in ROWS]
        assert expected_hit(scores, column, k).tolist() == pytest.approx(expected)
    expected = [brute_force(row, positive, lambda rank: 1 / rank) for row in ROWS]
    assert expected_reciprocal_rank(scores, column).tolist() == pytest.approx(expected)
    expected = [brute_force(row, positive, float) for row in ROWS]
    assert expected_rank(scores, column).tolist() == pytest.approx(expected)


def test_hand_computed_case() -> None:
    scores, positive = torch.tensor([[0.9, 0.8, 0.8, 0.8, 0.1]]), torch.tensor([2])
    assert expected_hit(scores, positive, 1).item() == 0.0
    assert expected_hit(scores, positive, 2).item() == pytest.approx(1 / 3)
    assert expected_hit(scores, positive, 4).item() == 1.0
    assert expected_reciprocal_rank(scores, positive).item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert expected_rank(scores, positive).item() == 3.0


def test_a_collapsed_model_scores_chance() -> None:
    embedding = torch.nn.functional.normalize(torch.randn(1, 160), dim=-1)
    scores = cosine_scores(embedding.expand(40, -1), embedding.expand(139, -1))
    positive = torch.randint(139, (40,))
    assert expected_hit(scores, positive, 1).mean().item() == pytest.approx(1 / 139)
    assert expected_hit(scores, positive, 5).mean().item() == pytest.approx(5 / 139)
    assert expected_rank(scores, positive).mean().item() == pytest.approx(70.0)


def test_equal_candidates_tie_in_spite_of_rounding() -> None:
    candidate = torch.nn.functional.normalize(torch.randn(1, 64), dim=-1).repeat(9, 1)
    candidate = candidate * (1 + 1e-8 * torch.arange(9)[:, None])
    above, tied = placement(cosine_scores(candidate[:1], candidate), torch.tensor([3]))
    assert (above.item(), tied.item()) == (0, 9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_positive_with_a_non_finite_score_is_last(bad: float) -> None:
    scores = torch.tensor([[bad, 0.1, bad, 0.2]])
    assert placement(scores, torch.tensor([0]))[0].item() == 3
    assert expected_rank(scores, torch.tensor([0])).item() == 4.0
    assert expected_hit(scores, torch.tensor([0]), 3).item() == 0.0
    assert expected_hit(scores, torch.tensor([0]), 4).item() == 1.0


def test_another_candidate_with_a_non_finite_score_ranks_above_unless_masked() -> None:
    scores = torch.tensor([[0.5, math.nan, math.inf, -math.inf, 0.1]])
    assert expected_rank(scores, torch.tensor([0])).item() == 3.0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, M\] and \[N\]"):
        expected_hit(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="a positive is outside the 3 candidates"):
        expected_hit(torch.zeros(1, 3), torch.tensor([3]), 1)
    with pytest.raises(ValueError, match=r"ExpectedHitRate\.k is 0; give 1 or more"):
        ExpectedHitRate(0)


def test_modules_average_over_updates() -> None:
    hit, mrr = ExpectedHitRate(2), ExpectedReciprocalRank()
    for rows in ([0], [1, 2, 3]):
        scores, positive = torch.tensor(ROWS)[rows], torch.full((len(rows),), 2)
        hit.update(scores, positive)
        mrr.update(scores, positive)
    whole, column = torch.tensor(ROWS[:4]), torch.full((4,), 2)
    assert hit.compute().item() == pytest.approx(expected_hit(whole, column, 2).mean().item())
    assert mrr.compute().item() == pytest.approx(expected_reciprocal_rank(whole, column).mean().item())


def _rank_main(rank: int, port: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric = ExpectedHitRate(1)
    rows = [[0], [1, 2, 3, 4]][rank]  # unequal parts, for which a mean of means would be wrong
    metric.update(torch.tensor(ROWS)[rows], torch.zeros(len(rows), dtype=torch.int64))
    value = metric.compute().item()
    torch.distributed.destroy_process_group()
    (Path(out) / str(rank)).write_text(repr(value))


@pytest.mark.slow
def test_two_ranks_agree_on_the_mean_over_all_queries(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank_main, args=(port, str(tmp_path)), nprocs=2)
    values = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    expected = expected_hit(torch.tensor(ROWS), torch.zeros(5, dtype=torch.int64), 1).mean().item()
    assert values == pytest.approx([expected, expected])
