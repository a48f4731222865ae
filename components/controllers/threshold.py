"""The controller that reasons where the direct embedding has low confidence."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mmemb.components.controllers._binary import binary
from mmemb.components.controllers._calibration import check_settings, fit_cut
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Threshold(Controller, name="threshold"):
    """Reasons where the direct path's own confidence is below a threshold fitted on validation queries.

    The controllers of MMEmb-R1 (arXiv 2604.06156) include this rule; the signal and the fit are ours. `calibrate` fits
    the threshold on validation queries: it maximises hit@1 minus a price per token, within a limit of tokens. Of
    equally good thresholds it takes the one with the fewest queries that reason.

    Args:
        signal: ``confidence``, the largest softmax probability of the direct embedding over the reference bank, in
            [0, 1]; or ``entropy``, the certainty 1 - H(p) / ln 2 of the decision p = softmax(decision logits), with a
            minus sign where the model prefers ``<think>``, in [-1, 1].
        threshold: queries with a signal below it reason; null fits it.
        price: cost of a rationale token, in hit@1; used by the fit.
        token_share: maximum number of tokens for the fit, as a share of the tokens when every query reasons; null for
            no limit.
        budget: maximum number of rationale tokens per query; null for the encoder's own budget.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        signal: Literal["confidence", "entropy"] = "confidence",
        threshold: float | None = None,
        price: float = 0.0,
        token_share: float | None = None,
        budget: int | None = None,
    ) -> None:
        check_settings(price, token_share, "threshold")
        self.signal = signal
        self.threshold = threshold
        self.fitted = threshold is None
        self.price = price
        self.token_share = token_share
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """A query reasons where its signal is below the threshold. The reported degree falls with the signal.

        Raises:
            ValueError: the threshold is not calibrated, or the signal needs a reference bank and there is none.
        """
        if self.threshold is None:
            raise ValueError(
                "controller threshold: not calibrated; calibrate it on validation queries or give `threshold`"
            )
        signal = self._signal(state)
        degree = 1 - signal if self.signal == "confidence" else (1 - signal) / 2
        return binary(signal.double() < self.threshold, degree, budget=self.limit)

    def calibrate(self, state: PrefillState) -> None:
        """Fits the threshold, unless one was given.

        Raises:
            ValueError: there are no queries, no reference bank, or the gain from reasoning is unknown.
        """
        if self.fitted:
            signal = self._signal(state)
            self.threshold = -fit_cut(-signal, state, price=self.price, token_share=self.token_share, who="threshold")

    @property
    def needs_calibration(self) -> bool:
        """Whether there is no threshold yet."""
        return self.threshold is None

    @property
    def calibration(self) -> dict[str, float]:
        """The threshold, once there is one."""
        return {} if self.threshold is None else {"threshold": self.threshold}

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
