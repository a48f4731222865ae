"""The state at ``<emb>``."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler, take


class EmbedToken(ProjectedPooler, name="embed_token"):
    """The hidden state at `<emb>`: what the model itself gathered for the embedding.

    Args:
        projection: width of a linear projection without bias; None: none.
        dim: embedding width: the first entries of the pooled state (Matryoshka); None: all.
    """

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`; the mask is not looked at."""
        return take(hidden, emb_position)
