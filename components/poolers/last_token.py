"""The pooler that takes the state of the last token."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler, last_real, take


class LastToken(ProjectedPooler, name="last_token"):
    """Takes the hidden state of a row's last real token, whatever that token is.

    Args:
        projection: width of a linear projection without bias; None for no projection.
        dim: embedding width, the first entries of the pooled state (Matryoshka); None for all entries.
    """

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`. The position of ``<emb>`` has no effect."""
        return take(hidden, last_real(attention_mask))
