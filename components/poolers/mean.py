"""The mean state."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler


class Mean(ProjectedPooler, name="mean"):
    """The mean of the hidden states of a row's real tokens.

    Args:
        projection: width of a linear projection without bias; None: none.
        dim: embedding width: the first entries of the pooled state (Matryoshka); None: all.
    """

    needs_all_states = True
    """Adaptive inference keeps only the state at ``<emb>``; for this pooler it encodes a row again."""

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`; the position of ``<emb>`` is not looked at."""
        weight = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
