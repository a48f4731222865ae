"""The joint phase: one model learns to write rationales and to embed with and without them.

    L = InfoNCE(e_r, e_t) + lambda_d InfoNCE(e_d, e_t) + lambda_cot NLL(r and the decision token | q)     [S]

over large in-batch negatives by gradient caching. A pair without a surviving rationale trains the direct path and the
decision ``<emb>``; with one, both paths and the decision ``<think>`` [D]. Costs two forward passes a row (one in the
last chunk) and one backward; memory is that of one chunk plus O((N + M) D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmemb.data.augment import PictureAugment
from mmemb.data.collate import candidate_layout
from mmemb.losses.distributed import all_sum, world_size
from mmemb.losses.gradcache import CachedLoss, ChunkOutput, cached_step
from mmemb.losses.infonce import InfoNCE
from mmemb.stages.contrast import Path, contrast
from mmemb.stages.objective import Choose, Engine, Objective, Parts, augmenter, check_chunk_size, next_token_loss
from mmemb.types import ModelInputs, Pair, Rationale, TrainBatch, TrainChunk


class Joint(Objective):
    """InfoNCE on the reasoned and the direct path, and next-token loss on rationale and decision.

    Args:
        chunk_size: queries of one backward pass; the global batch is as many chunks as the batch size needs.
        direct_weight: lambda_d, weight of the direct path's InfoNCE.
        reasoned_weight: weight of the reasoned path's InfoNCE.
        next_token_weight: lambda_cot, weight of the mean next-token loss.
        infonce: temperature of the contrastive loss (learnable and clamped, or fixed).
        augment: picture augmentation; null for none.

    Raises:
        ValueError: ``chunk_size`` below one.
    """

    needs_rationales = True

    def __init__(
        self,
        *,
        chunk_size: int = 32,
        direct_weight: float = 1.0,
        reasoned_weight: float = 1.0,
        next_token_weight: float = 0.5,
        infonce: InfoNCE | None = None,
        augment: PictureAugment | None = None,
    ) -> None:
        super().__init__()
        check_chunk_size(chunk_size)
        self.chunk_size = chunk_size
        self.direct_weight = direct_weight
        self.reasoned_weight = reasoned_weight
        self.next_token_weight = next_token_weight
        self.infonce = infonce if infonce is not None else InfoNCE()
        self.augment = augment
        self._choose: Choose | None = None

    def prepare_choice(self, choose: Choose) -> None:
        self._choose = choose

    def collate(self, parts: Parts, pairs: Sequence[Pair], seed: int) -> TrainBatch:
        rows = []
        for number, pair in enumerate(pairs):
            chosen = self._choose(pair, seed + number) if self._choose else ()
            rows.append(_Row(pair, tuple(chosen), seed + number))
        # Rows of like length share a chunk, which saves padding; the loss does not depend on the order.
        rows.sort(key=lambda row: max((len(rationale.text) for rationale, _ in row.chosen), default=0))
        layout = candidate_layout([row.pair for row in rows], chunk_size=self.chunk_size)
        starts = range(0, len(rows), self.chunk_size)
        return TrainBatch(
            chunks=[self._chunk(parts, rows[start : start + self.chunk_size]) for start in starts],
            query_id=torch.tensor(layout.query_id),
            candidate_id=torch.tensor(layout.candidate_id),
            positive=torch.tensor(layout.positive),
            tasks=[row.pair.task for row in rows],
        )

    def _chunk(self, parts: Parts, rows: Sequence[_Row]) -> TrainChunk:
        """Prepares n rows; a row's picture is augmented alike on both query paths, its target's otherwise."""
        pairs = [row.pair for row in rows]
        reasoned_rows = [number for number, row in enumerate(rows) for _ in row.chosen]
        chosen = [each for row in rows for each in row.chosen]
        reasoned = None
        if reasoned_rows:
            reasoned = parts.backbone.prepare(
                [pairs[number].query for number in reasoned_rows],
                rationales=[rationale.text for rationale, _ in chosen],
                augment=augmenter(self.augment, [2 * rows[number].seed for number in reasoned_rows]),
            )
        owners = [*range(len(rows)), *(number for number, pair in enumerate(pairs) for _ in pair.hard_negatives)]
        targets = [pair.positive for pair in pairs] + [item for pair in pairs for item in pair.hard_negatives]
        return TrainChunk(
            query=parts.backbone.prepare(
                [pair.query for pair in pairs], augment=augmenter(self.augment, [2 * row.seed for row in rows])
            ),
            reasoned=reasoned,
            reasoned_rows=torch.tensor(reasoned_rows, dtype=torch.int64),
            reasoned_weight=torch.tensor([weight for _, weight in chosen], dtype=torch.float32),
            target=parts.backbone.prepare(
                targets, augment=augmenter(self.augment, [2 * rows[number].seed + 1 for number in owners])
            ),
        )

    def step(self, parts: Parts, batch: TrainBatch, engine: Engine) -> dict[str, Tensor]:
        counts = [_label_counts(chunk) for chunk in batch.chunks]
        total = all_sum(torch.stack(counts).sum()).clamp(min=1)
        # Data-parallel training averages gradients over ranks: scaling by the world size makes that the global mean.
        token_scale = self.next_token_weight * world_size() / total
        written = torch.zeros((), device=total.device)

        def forward(chunk: TrainChunk, final: bool) -> ChunkOutput:
            hidden = parts.backbone(chunk.query)
            embeddings = {"query": _pool(parts, hidden, chunk.query)}
            target_hidden = parts.backbone(chunk.target)
            embeddings["target"] = _pool(parts, target_hidden, chunk.target)
            losses = []
            if final and self.next_token_weight:
                direct_only = torch.ones(len(chunk.query), dtype=torch.bool, device=hidden.device)
                direct_only[chunk.reasoned_rows] = False
                losses.append(next_token_loss(parts.backbone, hidden, chunk.query, direct_only))
            if chunk.reasoned is not None:
                reasoned_hidden = parts.backbone(chunk.reasoned)
                embeddings["reasoned"] = _pool(parts, reasoned_hidden, chunk.reasoned)
                if final and self.next_token_weight:
                    losses.append(next_token_loss(parts.backbone, reasoned_hidden, chunk.reasoned))
            if not losses:
                return ChunkOutput(embeddings)
            nll = torch.stack(losses).sum()
            written.add_(nll.detach())
            return ChunkOutput(embeddings, loss=nll * token_scale)

        def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
            return self._contrast(embeddings, batch)

        result = cached_step(batch.chunks, forward, loss, backward=engine.backward, no_sync=engine.no_sync)
        logs = {key: torch.as_tensor(value).detach() for key, value in result.logs.items()}
        logs["next_token"] = all_sum(written) / total
        logs["loss"] = result.loss.detach() + self.next_token_weight * logs["next_token"]
        logs["temperature"] = self.infonce.temperature.detach()
        return logs

    def _contrast(self, embeddings: dict[str, Tensor], batch: TrainBatch) -> CachedLoss:
        """Both InfoNCE terms over the global batch, with the gradient of every embedding and of the temperature."""
        device = embeddings["query"].device
        offsets = torch.tensor([0, *[len(chunk.query) for chunk in batch.chunks]]).cumsum(0)
        rows = torch.cat(
            [chunk.reasoned_rows + int(start) for chunk, start in zip(batch.chunks, offsets, strict=False)]
        )
        weight = torch.cat([chunk.reasoned_weight for chunk in batch.chunks])
        paths = [
            Path("direct", "query", self.direct_weight, torch.arange(len(embeddings["query"]), device=device)),
            Path("reasoned", "reasoned", self.reasoned_weight, rows, weight),
        ]
        return contrast(self.infonce, embeddings, batch, paths)


@dataclass(frozen=True)
class _Row:
    """A pair on its way into a chunk, with the rationales it trains on, their weights and a seed of its own."""

    pair: Pair
    chosen: tuple[tuple[Rationale, float], ...]
    seed: int


def _pool(parts: Parts, hidden: Tensor, inputs: ModelInputs) -> Tensor:
    return parts.pooler(hidden, inputs.tensors["attention_mask"], inputs.emb_position)


def _label_counts(chunk: TrainChunk) -> Tensor:
    """How many labels of a chunk train: the reasoned rows' all, and the decision of rows that only go direct."""
    labels = chunk.query.labels[:, 1:]
    direct_only = torch.ones(len(chunk.query), dtype=torch.bool, device=labels.device)
    direct_only[chunk.reasoned_rows] = False
    count = ((labels != -100) & direct_only[:, None]).sum()
    if chunk.reasoned is not None:
        count = count + (chunk.reasoned.labels[:, 1:] != -100).sum()
    return count
