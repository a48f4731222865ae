"""Turns pairs into the identities that a contrastive loss needs. Independent of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmemb.common.digests import number_of
from mmemb.types import Pair


@dataclass(frozen=True)
class Layout:
    """Says which candidate is the positive of which query, for N queries and M candidates.

    Attributes:
        query_id: N integers below 2**63, the identity of each query's positive.
        candidate_id: M integers, the identity of each candidate. A candidate that has the `query_id` of a query but is
            not in the row of its positive is the same target again. The loss must mask it.
        positive: N row numbers, the row of each query's positive among the candidates.
    """

    query_id: list[int]
    candidate_id: list[int]
    positive: list[int]


def identity(text_id: str) -> int:
    """Turns a text identity into a number in [0, 2**63). It is the same in every process (BLAKE2b)."""
    return number_of(text_id) >> 1


def candidate_layout(pairs: Sequence[Pair], *, chunk_size: int) -> Layout:
    """Computes the identities of a batch that is cut into chunks, the rows of one backward pass.

    The candidates come chunk by chunk: first the chunk's positives, then its hard negatives in the order of the rows.

    Args:
        pairs: the N pairs of the batch.
        chunk_size: pairs per chunk. The last chunk may have fewer.
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
