"""The pooler that takes the mean state."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler


class Mean(ProjectedPooler, name="mean"):
    """Takes the mean of the hidden states of a row's real tokens.

    Args:
        projection: width of a linear projection without bias; None for no projection.
        dim: embedding width, the first entries of the pooled state (Matryoshka); None for all entries.
    """

    needs_all_states = True
    """Adaptive inference keeps only the state at ``<emb>``, so for this pooler it encodes a row again."""

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`. The position of ``<emb>`` has no effect."""
        weight = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)
