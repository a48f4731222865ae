"""Fits the cut of a signal above which reasoning pays, for the controllers that are fitted on validation queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmemb.types import PrefillState

FAR = 1e9
"""A number beyond any signal that JSON can hold."""


def fit_cut(signal: Tensor, known: PrefillState, *, price: float, token_share: float | None, who: str) -> float:
    """The cut with the highest worth on the given queries, if those with ``signal > cut`` reason.

    The worth is the weighted mean over queries of the gain of hit@1, minus ``price`` per token. Of cuts with equal
    worth, the one with the fewest queries that reason is taken. Queries with equal signals get the same decision.

    Args:
        signal: [B] float, higher where reasoning is more likely to pay.
        known: the queries, with ``hit_gain`` and ``tokens``. Without ``weight`` all queries count the same.
        price: cost of a rationale token, in hit@1.
        token_share: maximum number of tokens, as a share of the tokens when every query reasons; None for no limit.
        who: the controller's name, for messages.

    Returns:
        A number between two signals; ``FAR`` if no query should reason, and ``-FAR`` if every query should.

    Raises:
        ValueError: there are no queries, or their gain from reasoning is unknown.
    """
    if not len(signal):
        raise ValueError(f"controller {who}: no validation queries to calibrate on; give data.validation some")
    if known.hit_gain is None or known.tokens is None:
        raise ValueError(f"controller {who}: the gain from reasoning is unknown here; calibrate on evaluated queries")
    ordered, order = signal.double().sort(descending=True)
    weight = torch.ones_like(ordered) if known.weight is None else known.weight.double()[order]
    tokens = (weight * known.tokens.double()[order]).cumsum(0)
    worth = (weight * (known.hit_gain.double() - price * known.tokens.double())[order]).cumsum(0)
    worth = torch.cat([worth.new_zeros(1), worth])  # entry k: the first k queries reason
    worth[1:-1][ordered[1:] == ordered[:-1]] = -math.inf
    if token_share is not None:
        worth[1:][tokens > token_share * tokens[-1] + 1e-9] = -math.inf
    reasoning = int((worth >= worth.max() - 1e-12).nonzero()[0])
    if reasoning in (0, len(ordered)):
        return -FAR if reasoning else FAR
    return float((ordered[reasoning - 1] + ordered[reasoning]) / 2)
