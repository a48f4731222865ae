"""What the binary controllers share: from a yes or no to a `Decision`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmemb.types import Decision


def binary(think: Tensor, probability: Tensor, *, budget: int) -> Decision:
    """A decision that gives every thinking row the same budget.

    Args:
        think: [B] bool.
        probability: [B] float, probability or degree of thinking.
        budget: most rationale tokens of a row that thinks, `Controller.limit`.
    """
    return Decision(think, probability.float(), torch.where(think, budget, 0))
