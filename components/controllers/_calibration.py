"""Where to cut a signal so that thinking pays: shared by the controllers that are fitted on validation queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmemb.types import PrefillState

FAR = 1e9
"""Beyond any signal, and still a number that JSON has."""


def fit_cut(signal: Tensor, known: PrefillState, *, price: float, token_share: float | None, who: str) -> float:
    """The value such that thinking where ``signal > value`` is worth most on the queries given.

    Worth is the mean over queries, by their weights, of what thinking adds to hit@1, less ``price`` a token. Of cuts
    that are worth the same it takes the one that thinks least. Equal signals are never parted.

    Args:
        signal: [B] float, higher where thinking is likelier to pay.
        known: the queries, with ``hit_gain`` and ``tokens`` known (and ``weight``, else all count alike).
        price: what a rationale token costs, in hit@1.
        token_share: most tokens, as a share of what thinking everywhere takes; None for no limit.
        who: the controller, for messages.

    Returns:
        a number between two signals; beyond any signal, ``FAR``, where nobody or everybody should think.

    Raises:
        ValueError: there are no queries, or it is not known what thinking brought them.
    """
    if not len(signal):
        raise ValueError(f"controller {who}: no validation queries to calibrate on; give data.validation some")
    if known.hit_gain is None or known.tokens is None:
        raise ValueError(f"controller {who}: what thinking adds is unknown here; calibrate on evaluated queries")
    ordered, order = signal.double().sort(descending=True)
    weight = torch.ones_like(ordered) if known.weight is None else known.weight.double()[order]
    tokens = (weight * known.tokens.double()[order]).cumsum(0)
    worth = (weight * (known.hit_gain.double() - price * known.tokens.double())[order]).cumsum(0)
    worth = torch.cat([worth.new_zeros(1), worth])  # entry k: the first k think
    worth[1:-1][ordered[1:] == ordered[:-1]] = -math.inf
    if token_share is not None:
        worth[1:][tokens > token_share * tokens[-1] + 1e-9] = -math.inf
    thinking = int((worth >= worth.max() - 1e-12).nonzero()[0])
    if thinking in (0, len(ordered)):
        return -FAR if thinking else FAR
    return float((ordered[thinking - 1] + ordered[thinking]) / 2)
