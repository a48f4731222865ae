"""A batch of the control phase: the pairs to roll out, and their inputs for the pass with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmemb.data.collate import candidate_layout
from mmemb.inference.prompts import length_order
from mmemb.interfaces import Backbone
from mmemb.types import ModelInputs, Pair


class ControlBatch:
    """N queries with what a step needs. It is not a dataclass, so that a trainer does not move the pairs.

    Args:
        pairs: the N queries, chunk after chunk.
        seeds: one seed per query.
        chunks: (prompts without ``<emb>``, targets followed by hard negatives), one backward pass each. They stay on
            the device where they were made. A step moves each chunk just before it uses it.
        query_id: [N] int64.
        candidate_id: [M] int64.
        positive: [N] int64, row of each query's positive among the targets.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        seeds: Sequence[int],
        chunks: Sequence[tuple[ModelInputs, ModelInputs]],
        query_id: Tensor,
        candidate_id: Tensor,
        positive: Tensor,
    ) -> None:
        self.pairs = pairs
        self.seeds = seeds
        self.chunks = chunks
        self.query_id = query_id
        self.candidate_id = candidate_id
        self.positive = positive

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ControlBatch:
        """Returns a copy with every tensor moved, except those of the chunks."""
        return ControlBatch(
            self.pairs,
            self.seeds,
            self.chunks,
            self.query_id.to(device, non_blocking=non_blocking),
            self.candidate_id.to(device, non_blocking=non_blocking),
            self.positive.to(device, non_blocking=non_blocking),
        )


def control_batch(backbone: Backbone, pairs: Sequence[Pair], seed: int, *, chunk_size: int) -> ControlBatch:
    """Makes a batch of N pairs, with prompts of similar length together. Pair i has the rollout seed ``seed + i``.

    Args:
        backbone: prepares the inputs, on the CPU.
        pairs: the N pairs.
        seed: seed of the batch.
        chunk_size: queries per chunk.
    """
    order = length_order([pair.query for pair in pairs])
    rows = [pairs[row] for row in order]
    layout = candidate_layout(rows, chunk_size=chunk_size)
    chunks = []
    for start in range(0, len(rows), chunk_size):
        chunk = rows[start : start + chunk_size]
        targets = [pair.positive for pair in chunk] + [item for pair in chunk for item in pair.hard_negatives]
        prompt = backbone.prepare([pair.query for pair in chunk], embed=False)
        chunks.append((prompt, backbone.prepare(targets)))
    return ControlBatch(
        rows,
        [seed + row for row in order],
        chunks,
        torch.tensor(layout.query_id),
        torch.tensor(layout.candidate_id),
        torch.tensor(layout.positive),
    )
