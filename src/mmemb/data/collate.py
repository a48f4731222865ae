"""From pairs to the identities a contrastive loss needs. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmemb.common.digests import number_of
from mmemb.types import Pair


@dataclass(frozen=True)
class Layout:
    """Who is whose positive, for N queries and M candidates.

    Attributes:
        query_id: N integers below 2**63, identity of each query's positive.
        candidate_id: M integers, identity of each candidate. One equal to a query's `query_id` in a row that is not
            its positive's is the same target again, to be masked.
        positive: N row numbers of each query's positive among the candidates.
    """

    query_id: list[int]
    candidate_id: list[int]
    positive: list[int]


def identity(text_id: str) -> int:
    """A text identity as a number in [0, 2**63), the same in every process (BLAKE2b)."""
    return number_of(text_id) >> 1


def candidate_layout(pairs: Sequence[Pair], *, chunk_size: int) -> Layout:
    """Identities of a batch cut into chunks, the rows of one backward pass.

    Candidates stand chunk after chunk: the chunk's positives, then its hard negatives in row order.

    Args:
        pairs: N rows.
        chunk_size: rows of a chunk; the last one may be shorter.
    """
    layout = Layout([], [], [])
    for start in range(0, len(pairs), chunk_size):
        chunk = pairs[start : start + chunk_size]
        own = [identity(pair.positive_id) for pair in chunk]
        first = len(layout.candidate_id)
        layout.positive.extend(range(first, first + len(chunk)))
        layout.query_id.extend(own)
        layout.candidate_id.extend(own)
        layout.candidate_id.extend(identity(name) for pair in chunk for name in pair.hard_negative_ids)
    return layout
