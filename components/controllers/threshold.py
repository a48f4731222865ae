"""The controller that reasons where the direct embedding has low confidence."""

from __future__ import annotations

from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.components.controllers._binary import binary
from mmemb.components.controllers._calibration import fit_cut
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Threshold(Controller, name="threshold"):
    """Reasons where the direct path's own confidence is below a threshold fitted on validation queries.

    The controllers of MMEmb-R1 (arXiv 2604.06156) include this rule; the signal and the fit are ours. `calibrate` fits
    the threshold on validation queries: it maximises hit@1 minus a price per token, within a limit of tokens. Of
    equally good thresholds it takes the one with the fewest queries that reason.

    Args:
        threshold: queries with a confidence below it reason; null fits it. The confidence is the largest softmax
            probability of the direct embedding over the confidence bank, in [0, 1].
        price: cost of a rationale token, in hit@1; used by the fit.
        token_share: maximum number of tokens for the fit, as a share of the tokens when every query reasons; null for
            no limit.
        budget: maximum number of rationale tokens per query; null for the encoder's own budget.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        threshold: float | None = None,
        price: float = 0.0,
        token_share: float | None = None,
        budget: int | None = None,
    ) -> None:
        check_numbers("controllers.threshold", at_least=0, price=price)
        check_numbers("controllers.threshold", at_least=0, at_most=1, token_share=token_share)
        check_numbers("controllers.threshold", at_least=1, budget=budget)
        self.threshold = threshold
        self.fitted = threshold is None
        self.price = price
        self.token_share = token_share
        self.budget = budget

    def decide(self, state: PrefillState) -> Decision:
        """A query reasons where its confidence is below the threshold. The reported degree is 1 - confidence.

        Raises:
            ValueError: the threshold is not calibrated, or there is no confidence bank.
        """
        if self.threshold is None:
            raise ValueError(
                "controller threshold: not calibrated; calibrate it on validation queries or give `threshold`"
            )
        confidence = _confidence(state)
        return binary(confidence.double() < self.threshold, 1 - confidence, budget=self.limit)

    def calibrate(self, state: PrefillState) -> None:
        """Fits the threshold, unless one was given.

        Raises:
            ValueError: there are no queries, there is no confidence bank, or the gain from reasoning is unknown.
        """
        if self.fitted:
            confidence = _confidence(state)
            self.threshold = -fit_cut(
                -confidence, state, price=self.price, token_share=self.token_share, who="threshold"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether there is no threshold yet."""
        return self.threshold is None

    @property
    def calibration(self) -> dict[str, float]:
        """The threshold, once there is one."""
        return {} if self.threshold is None else {"threshold": self.threshold}


def _confidence(state: PrefillState) -> Tensor:
    """Confidences [B] of the direct path."""
    if state.confidence is None:
        raise ValueError("controller threshold: there is no confidence bank, so no confidence; give a bank")
    return state.confidence
