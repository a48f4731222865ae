"""Computes the counterfactual gain of rationales: raw, or net of what the format alone would have gained."""

from __future__ import annotations

import math

from mmemb.rationales.pool import scored
from mmemb.types import Candidates


def gains(candidates: Candidates, *, net_of_placebo: bool = False) -> list[float]:
    """Returns the K gains of a pair's candidates in order, in nats.

        gain(r) = c(q, t | do(r)) - c(q, t | do(none))
        net(r)  = gain(r) - max(0, c(q, t | do(placebo of r)) - c(q, t | do(none)))

    The first formula is from the paper, the second is our choice. The placebo is a rationale of another pair of the
    task: its gain comes from the format without the content. A negative gain of the placebo is not subtracted, because
    a rationale earns nothing by harming less than nonsense does. A candidate without a placebo (nan) keeps its raw
    gain.

    Args:
        candidates: the candidates with their scores.
        net_of_placebo: whether to return net gains instead of raw gains.

    Raises:
        ValueError: the candidates have no scores, or net gains are requested and the placebos have no scores.
    """
    raw = [score - candidates.score_none for score in scored(candidates)]
    if not net_of_placebo or not raw:
        return raw
    format_alone = placebo_gains(candidates)
    if not format_alone:
        raise ValueError(
            f"pair {candidates.pair_id!r}: its rationale candidates were scored without placebos; "
            f"make the pool again under another path (`mmemb rationales generate`, then `score`), "
            f"or set net_of_placebo: false"
        )
    return [
        gain - (0.0 if math.isnan(placebo) else max(0.0, placebo))
        for gain, placebo in zip(raw, format_alone, strict=True)
    ]


def placebo_gains(candidates: Candidates) -> list[float]:
    """Returns the gain of each candidate's placebo over no rationale, in nats.

    K values, nan where a candidate has no placebo. Empty if no placebos were scored.
    """
    return [score - candidates.score_none for score in candidates.scores_placebo]


def surviving(candidates: Candidates, *, margin: float, net_of_placebo: bool = False) -> dict[int, float]:
    """Returns the gain of each candidate whose gain exceeds the margin, by the index of the candidate.

    Raises:
        ValueError: for the same reasons as in `gains`.
    """
    found = gains(candidates, net_of_placebo=net_of_placebo)
    return {index: gain for index, gain in enumerate(found) if gain > margin}
