"""Controllers on hand-made prefill states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmemb.components.controllers.oracle import Oracle
from mmemb.components.controllers.random import Random
from mmemb.components.controllers.rl import Rl
from mmemb.components.controllers.threshold import Threshold
from mmemb.interfaces import Controller
from mmemb.registry import create
from mmemb.types import NO_LIMIT, PrefillState

NAMES = ("always_reason", "never", "oracle", "random", "rl", "threshold")


def state(rows: int = 6, **known: torch.Tensor) -> PrefillState:
    generator = torch.Generator().manual_seed(1)
    direct = torch.nn.functional.normalize(torch.randn(rows, 32, generator=generator), dim=-1)
    return PrefillState(decision_logits=torch.randn(rows, 2, generator=generator), direct=direct, **known)


def known(rows: int = 6) -> PrefillState:
    return state(
        rows,
        confidence=torch.linspace(0.1, 0.9, rows),
        utility=torch.linspace(-1, 1, rows),
        hit_gain=torch.linspace(-1, 1, rows).round(),
        tokens=torch.arange(rows) + 3,
        weight=torch.ones(rows),
    )


def fitting(signal: list[float], gain: list[float], tokens: list[int] | None = None) -> PrefillState:
    """Queries on which the margin falls as the confidence rises, so that both controllers see the same order."""
    confidence = torch.tensor(signal)
    logits = torch.stack([-confidence, torch.zeros(len(signal))], dim=1)
    return PrefillState(
        logits,
        torch.zeros(len(signal), 4),
        confidence=confidence,
        hit_gain=torch.tensor(gain),
        tokens=torch.tensor(tokens or [10] * len(signal)),
    )


def built(name: str, **settings: Any) -> Controller:
    return create("controller", name, **({"threshold": 0.5} if name == "threshold" else {}), **settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_query_that_reasons_has_the_budget_and_no_other_has_any(name: str) -> None:
    decision = built(name).decide(known())
    assert decision.think.shape == decision.probability.shape == decision.budget.shape == (6,)
    assert (decision.think.dtype, decision.budget.dtype) == (torch.bool, torch.int64)
    assert decision.probability.dtype == torch.float32
    assert decision.budget.tolist() == [NO_LIMIT * think for think in decision.think.tolist()]
    assert ((decision.probability >= 0) & (decision.probability <= 1)).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "never"])
def test_every_query_that_reasons_has_the_budget_of_the_controller(name: str) -> None:
    decision = built(name, budget=7).decide(known())
    assert decision.think.any()
    assert decision.budget.tolist() == [7 * think for think in decision.think.tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_a_decision_does_not_depend_on_the_other_queries(name: str) -> None:
    whole, controller = known(), built(name)
    together = controller.decide(whole)
    for row in range(6):
        one = PrefillState(*(part[row : row + 1] for part in vars(whole).values() if part is not None))
        assert controller.decide(one).think.item() == together.think[row].item()


def test_no_query_reasons_with_never_and_every_query_with_always_reason() -> None:
    assert not built("never").decide(known()).think.any()
    assert built("always_reason").decide(known()).think.all()


def test_rl_follows_the_decision_token_and_its_offset() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.5]])
    given = PrefillState(decision_logits=logits, direct=torch.zeros(3, 4))
    assert Rl().decide(given).think.tolist() == [True, False, False]
    assert Rl(offset=0.6).decide(given).think.tolist() == [True, False, True]
    assert Rl(offset=-2.0).decide(given).think.tolist() == [False, False, False]
    assert Rl().decide(given).probability[0].item() == pytest.approx(1 / (1 + math.exp(-1)))
    wide = Rl(offset=0.6, spread=2.0).decide(given)
    assert wide.think.tolist() == [True, False, True]
    assert wide.probability[0].item() == pytest.approx(1 / (1 + math.exp(-0.8)))
    with pytest.raises(ValueError, match="spread is 0"):
        Rl(spread=0.0)


def test_oracle_reasons_where_the_gain_exceeds_the_price() -> None:
    given = state(3, utility=torch.tensor([-0.1, 0.0, 0.3]), hit_gain=torch.tensor([1.0, 0.0, 0.5]))
    assert Oracle().decide(given).think.tolist() == [True, False, True]
    assert Oracle(price=0.5).decide(given).think.tolist() == [True, False, False]
    assert Oracle(gain="utility").decide(given).think.tolist() == [False, False, True]
    assert Oracle(gain="utility", price=0.3).decide(given).think.tolist() == [False, False, False]


def test_oracle_raises_an_error_if_the_gain_is_unknown() -> None:
    with pytest.raises(ValueError, match="controller oracle: the gain from reasoning is known in evaluation only"):
        Oracle().decide(state())


def test_random_keeps_its_rate_and_its_seed() -> None:
    given = state(4000)
    think = Random(rate=0.3).decide(given).think
    assert think.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(think, Random(rate=0.3).decide(given).think)
    assert not torch.equal(think, Random(rate=0.3, seed=1).decide(given).think)
    assert not Random(rate=0.0).decide(given).think.any()
    assert Random(rate=1.0).decide(given).think.all()


def test_random_decides_the_same_in_spite_of_rounding() -> None:
    given = state(500)
    noisy = PrefillState(given.decision_logits, given.direct * (1 + 1e-6))
    assert torch.equal(Random().decide(given).think, Random().decide(noisy).think)


def test_random_raises_an_error_for_an_impossible_rate() -> None:
    with pytest.raises(ValueError, match=r"controllers\.random\.rate is 1\.5; give a number from 0 to 1"):
        Random(rate=1.5)


def test_queries_below_the_threshold_reason() -> None:
    given = state(3, confidence=torch.tensor([0.2, 0.5, 0.9]))
    decision = Threshold(threshold=0.5).decide(given)
    assert decision.think.tolist() == [True, False, False]
    torch.testing.assert_close(decision.probability, torch.tensor([0.8, 0.5, 0.1]))


def decided(controller: Controller, given: PrefillState) -> list[bool]:
    controller.calibrate(given)
    return controller.decide(given).think.tolist()


FITTED = pytest.mark.parametrize("kind", [Threshold, Rl])


@FITTED
def test_calibration_maximises_the_gain_from_reasoning(kind: type) -> None:
    given = fitting([0.9, 0.1, 0.3, 0.5, 0.7], [-0.5, 0.4, -0.1, 0.3, -0.2])
    assert decided(kind(), given) == [False, True, True, True, False]  # .4 - .1 + .3, against .4 for the first alone
    # With a price of .015 per token, and 10 tokens, reaching the second gain costs more than it adds.
    assert decided(kind(price=0.015), given) == [False, True, False, False, False]


@FITTED
def test_calibration_keeps_within_its_share_of_tokens(kind: type) -> None:
    given = fitting([0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.1, 0.1], [10, 20, 30, 40])
    assert decided(kind(token_share=0.6), given) == [True, True, True, False]
    assert decided(kind(token_share=0.59), given) == [True, True, False, False]
    assert decided(kind(token_share=0.0), given) == [False] * 4
    assert decided(kind(token_share=1.0), given) == [True] * 4


@FITTED
def test_calibration_finds_no_query_or_every_query_if_that_is_best(kind: type) -> None:
    assert decided(kind(), fitting([0.2, 0.4], [-1.0, -1.0])) == [False, False]
    assert decided(kind(), fitting([0.2, 0.4], [1.0, 1.0])) == [True, True]
    assert decided(kind(), fitting([0.2, 0.4], [0.0, 0.0])) == [False, False], "without a gain no query reasons"


@FITTED
def test_calibration_decides_the_same_for_equal_signals(kind: type) -> None:
    given = fitting([0.5, 0.5, 0.8], [1.0, -3.0, 0.5])
    assert decided(kind(), given) == [False] * 3  # a cut between the equal signals would seem to gain 1


@FITTED
def test_calibration_weighs_queries(kind: type) -> None:
    given = fitting([0.1, 0.2], [0.5, -0.4])
    given.weight = torch.tensor([1.0, 1.0])
    assert decided(kind(), given) == [True, False]
    given = fitting([0.1, 0.2], [-0.5, 0.4])
    given.weight = torch.tensor([1.0, 2.0])
    assert decided(kind(), given) == [True, True]


@FITTED
def test_a_fitted_value_can_be_given_to_another_controller(kind: type) -> None:
    given = fitting([0.9, 0.1, 0.3, 0.5, 0.7], [-0.5, 0.4, -0.1, 0.3, -0.2])
    controller = kind()
    controller.calibrate(given)
    other = kind(**controller.calibration)
    other.calibrate(fitting([0.5], [1.0]))  # a value that was given stays
    assert other.decide(given).think.tolist() == controller.decide(given).think.tolist()


@FITTED
def test_calibration_needs_queries_with_a_known_gain(kind: type) -> None:
    with pytest.raises(ValueError, match="the gain from reasoning is unknown"):
        kind().calibrate(state(2, confidence=torch.tensor([0.1, 0.2])))
    with pytest.raises(ValueError, match="no validation queries"):
        kind().calibrate(state(0, confidence=torch.zeros(0)))
    for wrong in ({"price": -1.0}, {"token_share": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            kind(**wrong)


def test_rl_gives_a_short_budget_to_small_margins() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 0.0]])
    given = PrefillState(decision_logits=logits, direct=torch.zeros(3, 4))
    decision = Rl(offset=0.0, budget=48, short_budget=8, full_margin=1.0).decide(given)
    assert decision.think.tolist() == [False, True, True]
    assert decision.budget.tolist() == [0, 8, 48]
    assert Rl(offset=0.6, budget=48, short_budget=8).decide(given).budget.tolist() == [0, 48, 48]
    assert Rl(offset=0.0, short_budget=80).decide(given).budget.tolist() == [0, 80, NO_LIMIT]
    with pytest.raises(ValueError, match="short_budget is 48; give a number of at least 1 and below 48"):
        Rl(budget=48, short_budget=48)
    with pytest.raises(ValueError, match="short_budget is 0; give 1 or more"):
        Rl(short_budget=0)


def test_threshold_says_what_is_missing() -> None:
    given = state(2, confidence=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="not calibrated; calibrate it"):
        Threshold().decide(given)
    with pytest.raises(ValueError, match="no confidence bank"):
        Threshold(threshold=0.5).decide(state(2))
