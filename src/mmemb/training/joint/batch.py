"""A batch of the joint phase: pairs with their rationales, cut into chunks of one backward pass each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmemb.data.augment import PictureAugment
from mmemb.data.collate import candidate_layout
from mmemb.interfaces import Choose, Model
from mmemb.training.joint.query_paths import QueryPaths, query_paths
from mmemb.training.objective import augmenter
from mmemb.types import ModelInputs, Pair, Rationale


@dataclass
class TrainChunk:
    """The rows of one backward pass.

    Attributes:
        query: n queries on both paths. Its ``rows`` give the query of each of the r rationales.
        reasoned_weight: [r] float32, the selector's loss weight of each rationale.
        target: n targets followed by this chunk's hard negatives, m >= n rows.
    """

    query: QueryPaths
    reasoned_weight: Tensor
    target: ModelInputs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainChunk:
        """Returns a copy with every tensor moved."""
        return TrainChunk(
            self.query.to(device, non_blocking),
            self.reasoned_weight.to(device, non_blocking=non_blocking),
            self.target.to(device, non_blocking),
        )


@dataclass
class TrainBatch:
    """A global batch cut into chunks, with the identities that mask false negatives.

    Attributes:
        chunks: the rows, in order. They stay on the device where they were made, because the pictures of a large batch
            would not fit next to the model. A step moves each chunk just before it uses it.
        query_id: [N] int64, identity of each query's positive.
        candidate_id: [M] int64, identity of each candidate, in chunk order (positives, then hard negatives).
        positive: [N] int64, row of each query's positive among the M candidates.
        tasks: N task names.
    """

    chunks: list[TrainChunk]
    query_id: Tensor
    candidate_id: Tensor
    positive: Tensor
    tasks: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainBatch:
        """Returns a copy with every tensor moved, except those of the chunks."""
        return TrainBatch(
            chunks=self.chunks,
            query_id=self.query_id.to(device, non_blocking=non_blocking),
            candidate_id=self.candidate_id.to(device, non_blocking=non_blocking),
            positive=self.positive.to(device, non_blocking=non_blocking),
            tasks=self.tasks,
        )


def joint_batch(
    model: Model,
    pairs: Sequence[Pair],
    seed: int,
    *,
    choose: Choose | None,
    chunk_size: int,
    augment: PictureAugment | None,
) -> TrainBatch:
    """Makes a batch on the CPU. It is safe in data-loader workers. Pair number i uses the seed ``seed + i``.

    Args:
        model: prepares the inputs.
        pairs: the N pairs.
        seed: seed of the batch.
        choose: the selector's choice. None means no rationales.
        chunk_size: pairs per backward pass.
        augment: picture augmentation. A query's picture changes equally on both paths, its target's differently.
    """
    rows = []
    for number, pair in enumerate(pairs):
        chosen = choose(pair, seed + number) if choose else ()
        rows.append(_Row(pair, tuple(chosen), seed + number))
    # Rows of similar length share a chunk, which saves padding. The loss does not depend on the order.
    rows.sort(key=lambda row: max((len(rationale.text) for rationale, _ in row.chosen), default=0))
    layout = candidate_layout([row.pair for row in rows], chunk_size=chunk_size)
    starts = range(0, len(rows), chunk_size)
    return TrainBatch(
        chunks=[_chunk(model, rows[start : start + chunk_size], augment) for start in starts],
        query_id=torch.tensor(layout.query_id),
        candidate_id=torch.tensor(layout.candidate_id),
        positive=torch.tensor(layout.positive),
        tasks=[row.pair.task for row in rows],
    )


@dataclass(frozen=True)
class _Row:
    """A pair with the rationales that it trains on, their weights and its own seed."""

    pair: Pair
    chosen: tuple[tuple[Rationale, float], ...]
    seed: int


def _chunk(model: Model, rows: Sequence[_Row], augment: PictureAugment | None) -> TrainChunk:
    pairs = [row.pair for row in rows]
    chosen = [each for row in rows for each in row.chosen]

    def of_queries(numbers: Sequence[int]) -> Callable[[Any, int], Any] | None:
        return augmenter(augment, [2 * rows[number].seed for number in numbers])

    owners = [*range(len(rows)), *(number for number, pair in enumerate(pairs) for _ in pair.hard_negatives)]
    targets = [pair.positive for pair in pairs] + [item for pair in pairs for item in pair.hard_negatives]
    return TrainChunk(
        query=query_paths(
            model,
            [pair.query for pair in pairs],
            [number for number, row in enumerate(rows) for _ in row.chosen],
            [rationale.text for rationale, _ in chosen],
            of_queries,
        ),
        reasoned_weight=torch.tensor([weight for _, weight in chosen], dtype=torch.float32),
        target=model.backbone.prepare(
            targets, augment=augmenter(augment, [2 * rows[number].seed + 1 for number in owners])
        ),
    )
