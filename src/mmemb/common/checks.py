"""The one way to refuse a number that is out of range."""

from __future__ import annotations


def refuse_below(least: float, owner: str, **settings: float | None) -> None:
    """Refuses settings that are less than the least one that means something; None stands for a default.

    Args:
        least: the least accepted.
        owner: what the settings belong to, in messages.
        settings: values by name.

    Raises:
        ValueError: names the first such setting.
    """
    for name, value in settings.items():
        if value is not None and not value >= least:  # nan, too
            raise ValueError(f"{owner}.{name}: expected {least} or more, got {value}; raise it or leave it out")
