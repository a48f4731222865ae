"""The state of the last token."""

from __future__ import annotations

from torch import Tensor

from .base import ProjectedPooler, last_real, take


class LastToken(ProjectedPooler, name="last_token"):
    """The hidden state of a row's last real token, whichever it is.

    Args:
        projection: width of a linear projection without bias; None: none.
        dim: embedding width: the first entries of the pooled state (Matryoshka); None: all.
    """

    def pool(self, hidden: Tensor, attention_mask: Tensor, emb_position: Tensor) -> Tensor:
        """See `ProjectedPooler.pool`; the position of ``<emb>`` is not looked at."""
        return take(hidden, last_real(attention_mask))
