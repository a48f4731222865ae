"""Makes a `Decision` from one yes or no per query, for the controllers with a single budget."""

from __future__ import annotations

import torch
from torch import Tensor

from mmemb.types import Decision


def binary(think: Tensor, probability: Tensor, *, budget: int) -> Decision:
    """A decision that gives every query that reasons the same budget.

    Args:
        think: [B] bool, whether the query reasons.
        probability: [B] float, probability or degree of reasoning.
        budget: maximum number of rationale tokens of a query that reasons, `Controller.limit`.
    """
    return Decision(think, probability.float(), torch.where(think, budget, 0))
