"""What a rationale is worth: the counterfactual gain, raw or net of what its format alone would have gained."""

from __future__ import annotations

import math

from mmemb.rationales.pool import scored
from mmemb.types import Candidates


def gains(candidates: Candidates, *, net_of_placebo: bool = False) -> list[float]:
    """K gains in nats, of a pair's candidates in order.

        gain(r) = c(q, t | do(r)) - c(q, t | do(none))                                   [A]
        net(r)  = gain(r) - max(0, c(q, t | do(placebo of r)) - c(q, t | do(none)))      [D]

    The placebo is a rationale of another pair of the task. What it gains, the format gives without the content. A
    placebo that harms takes nothing from r: not to harm as much as nonsense does is no merit. A candidate for which no
    placebo was found (nan) keeps its raw gain.

    Args:
        candidates: with their scores.
        net_of_placebo: net instead of raw.

    Raises:
        ValueError: the candidates were not scored, or net gains are asked for and no placebo was.
    """
    raw = [score - candidates.score_none for score in scored(candidates)]
    if not net_of_placebo or not raw:
        return raw
    format_alone = placebo_gains(candidates)
    if not format_alone:
        raise ValueError(
            f"pair {candidates.pair_id!r}: its rationale candidates were scored without placebos; "
            f"make the pool anew under another path (`mmemb rationales generate`, then `score`), "
            f"or set net_of_placebo: false"
        )
    return [
        gain - (0.0 if math.isnan(placebo) else max(0.0, placebo))
        for gain, placebo in zip(raw, format_alone, strict=True)
    ]


def placebo_gains(candidates: Candidates) -> list[float]:
    """K gains of the candidates' placebos over none, nan where there was no placebo; empty where none was scored."""
    return [score - candidates.score_none for score in candidates.scores_placebo]


def surviving(candidates: Candidates, *, margin: float, net_of_placebo: bool = False) -> dict[int, float]:
    """Candidates whose gain exceeds the margin, by index, with that gain.

    Raises:
        ValueError: as `gains`.
    """
    found = gains(candidates, net_of_placebo=net_of_placebo)
    return {index: gain for index, gain in enumerate(found) if gain > margin}
