"""The one way to refuse a number that is out of range. It works for settings from files and for calls from Python."""

from __future__ import annotations


def check_numbers(
    owner: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **values: float | None,
) -> None:
    """Raises for the first value that is out of range; nan is out of every range.

    Args:
        owner: what the values belong to, such as ``model`` or ``workers.openai``; messages begin with it.
        at_least: smallest value allowed.
        above: every value must be larger than this.
        at_most: largest value allowed.
        below: every value must be smaller than this.
        values: numbers by name. None is a default and always passes, here and as a bound.

    Raises:
        ValueError: names the owner, the value's name, the value and what to give.
    """
    for name, value in values.items():
        if value is not None and not (
            value == value  # nan is not equal to itself
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        ):
            raise ValueError(f"{owner}.{name} is {value}; give {_range(at_least, above, at_most, below)}")


def _range(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    """The range in words."""
    if at_least is not None and at_most is not None:
        return f"a number from {at_least} to {at_most}"
    bounds = {"of at least": at_least, "above": above, "of at most": at_most, "below": below}
    words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    return (
        f"{at_least} or more" if words == [f"of at least {at_least}"] else " ".join(["a number", " and ".join(words)])
    )
