"""A learned mixture of states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemb.common.checks import check_numbers
from mmemb.interfaces import SetupContext

from .base import ProjectedPooler


class Attention(ProjectedPooler, name="attention"):
    """A learned query attends to the hidden states of a row's real tokens, with one set of weights a head.

    The state is cut into heads of equal width; each head's query scores that head's slice of every token, and the
    slices are averaged by the softmax of the scores. It starts as `mean`: the queries start at zero.

    Args:
        heads: number of heads; divides the hidden width.
        projection: width of a linear projection without bias; None: none.
        dim: embedding width: the first entries of the pooled state (Matryoshka); None: all.
    """

    needs_all_states = True
    """Adaptive inference keeps only the state at ``<emb>``; for this pooler it encodes a row again."""

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
        """See `ProjectedPooler.pool`; the position of ``<emb>`` is not looked at."""
        rows, columns, width = hidden.shape
        slices = hidden.reshape(rows, columns, self.heads, -1)
        scores = torch.einsum("bthd,hd->bth", slices, self.query.to(hidden.dtype)) / slices.shape[-1] ** 0.5
        scores = scores.masked_fill(attention_mask[..., None] == 0, float("-inf"))
        weights = F.softmax(scores.float(), dim=1).to(hidden.dtype)
        return torch.einsum("bth,bthd->bhd", weights, slices).reshape(rows, width)
