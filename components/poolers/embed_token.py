"""The pooler that takes the state at ``<emb>``."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler, take


class EmbedToken(ProjectedPooler, name="embed_token"):
    """Takes the hidden state at `<emb>`, in which the model itself gathers the embedding.

    Args:
        projection: width of a linear projection without bias; None for no projection.
        dim: embedding width, the first entries of the pooled state (Matryoshka); None for all entries.
    """

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`. The mask has no effect."""
        return take(hidden, emb_position)
