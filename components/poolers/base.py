"""The base of every pooler: an optional projection, Matryoshka truncation and normalisation.

A pooler implements only `pool`.

Legend: B rows, T columns, H hidden width, P projected width, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmemb.common.checks import check_numbers
from mmemb.interfaces import Pooler, SetupContext


class ProjectedPooler(Pooler):
    """Projects a pooled state [B, H] to [B, P], takes its first D entries and scales them to unit length, in float32.

    Args:
        projection: width P of a linear projection without bias; None for no projection, so P = H.
        dim: embedding width D, the first D of P entries (Matryoshka, arXiv 2205.13147); None for all entries.
    """

    def __init__(self, *, projection: int | None = None, dim: int | None = None) -> None:
        super().__init__()
        check_numbers("pooler", at_least=1, projection=projection, dim=dim)
        self.projection = projection
        self.dim = dim
        self.project: nn.Linear | None = None

    def setup(self, context: SetupContext) -> None:
        """See `Pooler.setup`.

        Raises:
            ValueError: ``dim`` is larger than the width it cuts.
        """
        width = self.projection or context.hidden_size
        check_numbers("pooler", at_most=width, dim=self.dim)
        if self.projection is not None:
            self.project = nn.Linear(context.hidden_size, self.projection, bias=False)
        self._size = self.dim or width

    @property
    def size(self) -> int:
        """Width D of the embeddings (after `setup`)."""
        return self._size

    @abstractmethod
    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """Hidden [B, T, H], mask [B, T], position of ``<emb>`` [B] -> one state per row [B, H]."""

    def forward(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """Hidden [B, T, H], mask [B, T], position of ``<emb>`` [B] -> [B, D] float32, L2-normalised."""
        pooled = self.pool(hidden, attention_mask, emb_position)
        if self.project is not None:
            pooled = self.project(pooled.to(self.project.weight.dtype))
        return F.normalize(pooled.float()[:, : self.size], dim=-1)


def last_real(attention_mask: Tensor) -> Tensor:
    """Column of each row's last real token, [B] int64, of a mask [B, T]."""
    columns = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask.long() * columns).amax(1) - 1


def take(hidden: Tensor, column: Tensor) -> Tensor:
    """The states [B, H] of hidden [B, T, H], each at its row's column [B]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), column]
