"""Tests that selectors draw as their formulas say, and only among the candidates."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest

from mmemb.components.selectors.all import All
from mmemb.components.selectors.best_of import BestOf
from mmemb.components.selectors.counterfactual import Counterfactual
from mmemb.components.selectors.oracle import Oracle
from mmemb.components.selectors.random import Random
from mmemb.interfaces import Selector
from mmemb.rationales.gains import gains
from mmemb.registry import available, create
from mmemb.types import Candidates, Rationale

DRAWS = 4000


def candidates(*scores: float, none: float = -1.0, placebos: tuple[float, ...] = ()) -> Candidates:
    return Candidates("p", tuple(Rationale(f"r{index}") for index in range(len(scores))), scores, none, placebos)


def shares(selector: Selector, given: Candidates) -> dict[int | None, float]:
    drawn = Counter(selector.select(given, seed=seed).index for seed in range(DRAWS))
    return {index: count / DRAWS for index, count in drawn.items()}


@pytest.fixture(params=available("selector"))
def selector(request: pytest.FixtureRequest) -> Selector:
    made = create("selector", request.param)
    assert isinstance(made, Selector)
    return made


def test_every_selector_is_deterministic_and_stays_within_the_candidates(selector: Selector) -> None:
    for given in (candidates(-0.2, -3.0, -0.9), candidates(-5.0), candidates(-1.0, -1.0)):
        for seed in range(50):
            chosen = selector.select(given, seed=seed)
            assert chosen == selector.select(given, seed=seed)
            assert chosen.index is None or 0 <= chosen.index < len(given.rationales)
            assert chosen.weight > 0


def test_every_selector_takes_the_direct_path_without_candidates(selector: Selector) -> None:
    assert selector.select(candidates(), seed=3).index is None


def test_every_selector_works_with_huge_scores(selector: Selector) -> None:
    for given in (candidates(1e30, -1e30, 0.0), candidates(-1e308, -1e308, none=1e308), candidates(5e3, 4e3)):
        chosen = selector.select(given, seed=1)
        assert chosen.index is None or math.isfinite(chosen.weight)


def test_counterfactual_draws_in_proportion_to_the_exponential_of_the_gain() -> None:
    found = shares(Counterfactual(temperature=0.5), candidates(-0.8, -0.5, -0.1, -1.2))
    weights = [math.exp(gain / 0.5) for gain in (0.2, 0.5, 0.9)]
    for index, weight in enumerate(weights):
        expected = weight / sum(weights)
        # Four standard errors of a share over this many draws.
        assert found[index] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS))
    assert 3 not in found


def test_counterfactual_keeps_only_candidates_above_the_margin() -> None:
    given = candidates(-0.5, -0.4)
    assert shares(Counterfactual(margin=0.5, temperature=100.0), given) == {1: 1.0}
    assert shares(Counterfactual(margin=0.6), given) == {None: 1.0}


def test_counterfactual_at_a_low_temperature_takes_the_best() -> None:
    assert shares(Counterfactual(temperature=1e-6), candidates(-0.5, -0.4, -0.45)) == {1: 1.0}


def test_counterfactual_prefers_an_infinite_gain_to_nan() -> None:
    assert shares(Counterfactual(), candidates(-0.5, math.inf)) == {1: 1.0}
    assert shares(Counterfactual(), candidates(-math.inf, none=-math.inf)) == {None: 1.0}


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_counterfactual_needs_a_positive_temperature(temperature: float) -> None:
    with pytest.raises(
        ValueError, match=rf"selectors\.counterfactual\.temperature is {temperature}; give a number above 0"
    ):
        Counterfactual(temperature=temperature)


def test_every_selector_trains_on_what_it_selects(selector: Selector) -> None:
    for given in (candidates(-0.2, -3.0, -0.9), candidates(-5.0), candidates()):
        many = selector.select_many(given, seed=5)
        if isinstance(selector, All):
            assert [each.index for each in many] == list(range(len(given.rationales)))
            assert sum(each.weight for each in many) == pytest.approx(1.0 if many else 0.0)
        else:
            assert many == (selector.select(given, seed=5),)


def test_all_needs_no_scores() -> None:
    given = candidates(math.nan, math.nan, none=math.nan)
    assert len(All().select_many(given, seed=0)) == 2
    assert shares(All(), given).keys() == {0, 1}


def test_best_of_takes_the_largest_gain_that_exceeds_the_margin() -> None:
    assert shares(BestOf(), candidates(-0.5, -0.4, -0.45)) == {1: 1.0}
    assert shares(BestOf(), candidates(-1.5, -1.0)) == {None: 1.0}
    assert shares(BestOf(margin=0.6), candidates(-0.5, -0.4)) == {None: 1.0}
    assert BestOf().select(candidates(-0.4, -0.4), seed=3).index == 0


@pytest.mark.parametrize("selector", [Counterfactual(net_of_placebo=True), BestOf(net_of_placebo=True)])
def test_net_of_placebo_drops_the_gain_of_the_format(selector: Selector) -> None:
    # The first gains 0.5 and its placebo 0.6, so the format helps. The second gains 0.2 and its placebo harms, so the
    # content helps.
    given = candidates(-0.5, -0.8, none=-1.0, placebos=(-0.4, -2.0))
    assert shares(selector, given) == {1: 1.0}
    assert shares(type(selector)(), given).keys() >= {0}  # raw gains prefer the first
    assert shares(selector, candidates(-0.5, placebos=(math.nan,))) == {0: 1.0}
    with pytest.raises(ValueError, match="scored without placebos; .*or set net_of_placebo: false"):
        selector.select(candidates(-0.5), seed=0)


def test_a_placebo_that_harms_adds_nothing_to_its_candidate() -> None:
    given = candidates(-1.2, -0.9, none=-1.0, placebos=(-5.0, -0.95))
    assert gains(given, net_of_placebo=True) == pytest.approx([-0.2, 0.05])


@pytest.mark.parametrize("selector", [Counterfactual(), BestOf(), Oracle()])
def test_the_error_for_missing_scores_names_the_command_to_run(selector: Selector) -> None:
    with pytest.raises(ValueError, match="have not been scored; run `mmemb rationales score`"):
        selector.select(candidates(-0.5, math.nan), seed=0)


def test_random_is_uniform_and_needs_no_scores() -> None:
    found = shares(Random(), candidates(*[math.nan] * 5, none=math.nan))
    assert found.keys() == {0, 1, 2, 3, 4}
    assert all(share == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / DRAWS)) for share in found.values())


def test_random_draws_differently_with_another_seed() -> None:
    given = candidates(*[0.0] * 8)
    one, other = Random(seed=0), Random(seed=1)
    assert [one.select(given, seed=s) for s in range(20)] != [other.select(given, seed=s) for s in range(20)]


def test_oracle_takes_the_best_score_even_if_it_harms() -> None:
    assert shares(Oracle(), candidates(-3.0, -2.0, -2.5)) == {1: 1.0}
    assert Oracle().select(candidates(-2.0, -2.0), seed=7).index == 0


def test_choices_are_the_same_in_another_process() -> None:
    given = candidates(-0.5, -0.45, -0.4)
    here = [Counterfactual().select(given, seed=seed).index for seed in range(40)]
    code = (
        "from mmemb.components.selectors.counterfactual import Counterfactual as C;"
        "from mmemb.types import Candidates, Rationale;"
        "given = Candidates('p', tuple(Rationale(f'r{i}') for i in range(3)), (-0.5, -0.45, -0.4), -1.0);"
        "print([C().select(given, seed=seed).index for seed in range(40)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    )
    assert there.stdout.strip() == str(here)
