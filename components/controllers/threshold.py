"""Think where the direct path is unsure of itself."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mmemb.components.controllers._binary import binary
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Threshold(Controller, name="threshold"):
    """Reasons where the direct path's own confidence is below a threshold fitted on validation queries.

    The controllers of MMEmb-R1 (arXiv 2604.06156) include this rule; signal and fit are ours. `calibrate` fits in one
    of two ways:

    - to a budget (``rate`` given): the threshold below which that share of the validation queries lies;
    - to pay (``rate`` null): the threshold that maximises the mean over queries of think * (utility - price), where
      the utility of thinking is s_r - s_d. Of equally good thresholds it takes the one that thinks least.

    Args:
        signal: ``confidence``, the largest softmax probability of the direct embedding over the reference bank, in [0,
            1]; or ``entropy``, the certainty 1 - H(p) / ln 2 of the decision p = softmax(decision logits), counted
            negative where the model leans to ``<think>``, in [-1, 1].
        threshold: rows with a signal below it think; null until calibrated.
        rate: share of queries to think about, in [0, 1]; null fits to utility instead.
        price: what thinking about a query costs, in units of the utility; used without a rate.
        budget: most rationale tokens of a row.
    """

    def __init__(
        self,
        signal: Literal["confidence", "entropy"] = "confidence",
        threshold: float | None = None,
        rate: float | None = None,
        price: float = 0.0,
        budget: int = 48,
    ) -> None:
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"controller threshold: rate is {rate}; give a share between 0 and 1, or null")
        self.signal = signal
        self.threshold = threshold
        self.rate = rate
        self.price = price
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """Thinks where the signal is below the threshold; the degree reported falls with the signal.

        Raises:
            ValueError: not calibrated, or the signal needs a reference bank and there is none.
        """
        if self.threshold is None:
            raise ValueError(
                "controller threshold: not calibrated; calibrate it on validation queries or give `threshold`"
            )
        signal = self._signal(state)
        degree = 1 - signal if self.signal == "confidence" else (1 - signal) / 2
        return binary(signal.double() < self.threshold, degree, budget=self.budget)

    def calibrate(self, state: PrefillState) -> None:
        """Fits the threshold.

        Raises:
            ValueError: no queries; or a fit to utility without known utility; or no reference bank.
        """
        signal, order = self._signal(state).double().sort()
        if not len(signal):
            raise ValueError("controller threshold: no validation queries to calibrate on; give some, or a `threshold`")
        count = len(signal)
        if self.rate is not None:
            thinking = round(self.rate * count)
        elif state.utility is None:
            raise ValueError(
                "controller threshold: the utility is unknown, so it cannot be fitted to pay; give a `rate`"
            )
        else:
            worth = torch.cat([signal.new_zeros(1), (state.utility.double()[order] - self.price).cumsum(0)])
            # A threshold cannot part equal signals: cutting between them is not on offer.
            worth[1:-1][signal[1:] == signal[:-1]] = -math.inf
            thinking = int((worth == worth.max()).nonzero()[0])
        self.threshold = _between(signal, thinking)

    def _signal(self, state: PrefillState) -> Tensor:
        if self.signal == "confidence":
            if state.confidence is None:
                raise ValueError(
                    "controller threshold: no reference bank, so no confidence; give a bank, or use `signal: entropy`"
                )
            return state.confidence
        logits = state.decision_logits.float()
        probability = logits.softmax(dim=-1)
        entropy = -(probability * logits.log_softmax(dim=-1)).sum(dim=-1)
        return torch.sign(probability[:, 1] - probability[:, 0]) * (1 - entropy / math.log(2))


def _between(signal: Tensor, count: int) -> float:
    """A number that has the ``count`` smallest of the sorted signals [N] below it, the others not (ties: fewer)."""
    if count == 0:
        return -math.inf
    if count == len(signal):
        return math.inf
    low, high = signal[count - 1].item(), signal[count].item()
    return high if low == high else (low + high) / 2
