"""From pairs to the identities a contrastive loss needs. Nothing here knows a model.

A batch is cut into chunks, the rows of one backward pass. Its candidates stand chunk after chunk: the chunk's
positives, then its hard negatives (`mmemb.types.TrainBatch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mmemb.types import Item, Pair


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
    return int.from_bytes(hashlib.blake2b(text_id.encode(), digest_size=8).digest(), "big") >> 1


def chunked(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    """Pairs in chunks of `size`, the last one possibly shorter."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def targets(chunk: Sequence[Pair]) -> list[Item]:
    """The candidates of one chunk: n positives, then every hard negative in row order."""
    return [pair.positive for pair in chunk] + [item for pair in chunk for item in pair.hard_negatives]


def lay_out(chunks: Sequence[Sequence[Pair]]) -> Layout:
    """Identities of all chunks' queries and candidates, candidates in the order of `targets` chunk after chunk."""
    layout = Layout([], [], [])
    for chunk in chunks:
        own = [identity(pair.positive_id) for pair in chunk]
        first = len(layout.candidate_id)
        layout.positive.extend(range(first, first + len(chunk)))
        layout.query_id.extend(own)
        layout.candidate_id.extend(own)
        layout.candidate_id.extend(identity(name) for pair in chunk for name in pair.hard_negative_ids)
    return layout
