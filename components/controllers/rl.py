"""The learned decision: the model itself writes ``<think>`` or ``<emb>`` after the prompt."""

from __future__ import annotations

import torch

from mmemb.common.checks import check_numbers
from mmemb.components.controllers._calibration import fit_cut
from mmemb.interfaces import Controller
from mmemb.types import Decision, PrefillState


class Rl(Controller, name="rl"):
    """Follows the model's own decision token, trained jointly and by reinforcement learning.

    MMEmb-R1 (arXiv 2604.06156) lets the model choose and learns the choice by GRPO. A query reasons where the margin
    m = (l_think - l_emb + offset) / spread is above 0. The offset is one number for all queries: with a lower offset,
    fewer queries reason. `calibrate` fits it on validation queries: it maximises hit@1 minus a price per token, within
    a limit of tokens. A given offset is not fitted.

    With ``short_budget`` there are three levels: no rationale (m <= 0), a short one (0 < m <= ``full_margin``) and a
    full one (m > ``full_margin``).

    Args:
        offset: number added to the logit of ``<think>``, in nats; null fits it (0 until then).
        price: cost of a rationale token, in hit@1; used by the fit.
        token_share: maximum number of tokens for the fit, as a share of the tokens when every query reasons; null for
            no limit.
        budget: maximum number of rationale tokens of a full rationale; null for the encoder's own budget.
        short_budget: maximum number of rationale tokens of a short rationale; null leaves this level out.
        full_margin: m above which a query has the full budget; used with ``short_budget``.
        spread: unit of the margin, in nats, from the policy that the control phase learned. It does not change which
            queries reason. It changes their probability and the meaning of ``full_margin``.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        offset: float | None = None,
        price: float = 0.0,
        token_share: float | None = None,
        budget: int | None = None,
        short_budget: int | None = None,
        full_margin: float = 1.0,
        spread: float = 1.0,
    ) -> None:
        check_numbers("controllers.rl", at_least=0, price=price)
        check_numbers("controllers.rl", at_least=0, at_most=1, token_share=token_share)
        check_numbers("controllers.rl", at_least=1, budget=budget)
        check_numbers("controllers.rl", at_least=1, below=budget, short_budget=short_budget)
        check_numbers("controllers.rl", above=0, full_margin=full_margin, spread=spread)
        self.budget = budget
        self.spread = spread
        self.offset = 0.0 if offset is None else offset
        self.fitted = offset is None
        self.price = price
        self.token_share = token_share
        self.short_budget = short_budget
        self.full_margin = full_margin

    def decide(self, state: PrefillState) -> Decision:
        """A query reasons where its margin is above 0."""
        margin = (state.margin + self.offset) / self.spread
        think = margin > 0
        budget = torch.where(think, self.limit, 0)
        if self.short_budget is not None:
            budget = torch.where(think & (margin <= self.full_margin), self.short_budget, budget)
        return Decision(think, margin.sigmoid(), budget)

    def calibrate(self, state: PrefillState) -> None:
        """Fits the offset, unless one was given.

        Raises:
            ValueError: there are no queries, or the gain from reasoning is unknown.
        """
        if self.fitted:
            self.offset = -fit_cut(state.margin, state, price=self.price, token_share=self.token_share, who="rl")

    @property
    def calibration(self) -> dict[str, float]:
        """The offset in use."""
        return {"offset": self.offset}
