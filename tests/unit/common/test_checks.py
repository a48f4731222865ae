"""A number out of range is refused. The message has its place, name and value, and the valid range."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmemb.common.checks import check_numbers


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"at_least": 1}, [1, 5, math.inf], [0, 0.999, -math.inf]),
        ({"above": 0}, [1e-30, 3], [0, -1]),
        ({"at_most": 4}, [4, -math.inf], [4.001, 5]),
        ({"below": 4}, [3.999, 0], [4, 5]),
        ({"at_least": 0, "at_most": 1}, [0, 0.5, 1], [-0.001, 1.001]),
        ({"above": 0, "at_most": 1}, [0.001, 1], [0, 1.001]),
        ({"at_least": 0, "below": 1}, [0, 0.999], [-1, 1]),
        ({"above": 0, "below": None}, [1, math.inf], [0]),
        ({}, [0, math.inf], []),
    ],
)
def test_each_bound_refuses_numbers_beyond_it(bounds: dict[str, Any], good: list[float], bad: list[float]) -> None:
    for value in [*good, None]:
        check_numbers("model", **bounds, other=None, budget=value)
    for value in [*bad, math.nan]:
        with pytest.raises(ValueError, match=rf"^model\.budget is {value}; give "):
            check_numbers("model", **bounds, other=good[0], budget=value)


@pytest.mark.parametrize(
    ("bounds", "allowed"),
    [
        ({"at_least": 1}, "1 or more"),
        ({"above": 0}, "a number above 0"),
        ({"at_least": 0, "at_most": 1}, "a number from 0 to 1"),
        ({"above": 0, "at_most": 1}, "a number above 0 and of at most 1"),
        ({"at_least": 0, "below": 1}, "a number of at least 0 and below 1"),
        ({"above": 0, "below": 48}, "a number above 0 and below 48"),
    ],
)
def test_the_message_names_the_valid_range(bounds: dict[str, float], allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^workers\.openai\.timeout is -5; give {allowed}$"):
        check_numbers("workers.openai", **bounds, timeout=-5)
    if "at_most" not in bounds and "below" not in bounds:
        check_numbers("workers.openai", **bounds, timeout=5)


def test_the_first_wrong_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"^data\.b is 0"):
        check_numbers("data", at_least=1, a=1, b=0, c=-1)
