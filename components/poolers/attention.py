"""The pooler that learns a weighted mean of states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemb.common.checks import check_numbers
from mmemb.interfaces import SetupContext

from .base import ProjectedPooler


class Attention(ProjectedPooler, name="attention"):
    """Attends with a learned query to the hidden states of a row's real tokens, with one set of weights per head.

    The state is cut into heads of equal width. Each head's query scores that head's slice of every token, and the
    slices are averaged by the softmax of the scores. The queries start at zero, so the pooler starts as `mean`.

    Args:
        heads: number of heads; it must divide the hidden width.
        projection: width of a linear projection without bias; None for no projection.
        dim: embedding width, the first entries of the pooled state (Matryoshka); None for all entries.
    """

    needs_all_states = True
    """Adaptive inference keeps only the state at ``<emb>``, so for this pooler it encodes a row again."""

    def __init__(self, *, heads: int = 1, projection: int | None = None, dim: int | None = None) -> None:
        super().__init__(projection=projection, dim=dim)
        check_numbers("pooler", at_least=1, heads=heads)
        self.heads = heads

    def setup(self, context: SetupContext) -> None:
        """See `Pooler.setup`.

        Raises:
            ValueError: the heads do not divide H, or ``dim`` is larger than the width it cuts.
        """
        super().setup(context)
        hidden_size = context.hidden_size
        if hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the hidden width {hidden_size}; take a divisor")
        self.query = nn.Parameter(torch.zeros(self.heads, hidden_size // self.heads))

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`. The position of ``<emb>`` has no effect."""
        rows, columns, width = hidden.shape
        slices = hidden.reshape(rows, columns, self.heads, -1)
        scores = torch.einsum("bthd,hd->bth", slices, self.query.to(hidden.dtype)) / slices.shape[-1] ** 0.5
        scores = scores.masked_fill(attention_mask[..., None] == 0, float("-inf"))
        weights = F.softmax(scores.float(), dim=1).to(hidden.dtype)
        return torch.einsum("bth,bthd->bhd", weights, slices).reshape(rows, width)
