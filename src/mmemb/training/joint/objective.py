"""The joint phase: one model learns to write rationales and to embed with and without them.

    L = InfoNCE(e_r, e_t) + lambda_d InfoNCE(e_d, e_t) + lambda_cot NLL(r and the decision token | q)

The loss comes from the MMEmb-R1 paper (arXiv 2604.06156). Gradient caching allows many in-batch negatives. A pair
without a surviving rationale trains the direct path and the decision ``<emb>``. A pair with a rationale trains both
paths and the decision ``<think>`` (our choice). If the model allows it, both paths continue from one pass over the
prompt (`query_paths`).

Cost: two forward passes per row (one in a chunk that keeps its graph) and one backward pass. Memory holds the kept
graphs plus O((N + M) D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.data.augment import PictureAugment
from mmemb.interfaces import Choose, Model, SetupContext
from mmemb.losses.collectives import all_sum, world_size
from mmemb.losses.gradcache import CachedLoss, ChunkOutput, cached_step
from mmemb.losses.infonce import InfoNCE
from mmemb.training.contrast import PathLoss, contrast
from mmemb.training.joint.batch import TrainBatch, TrainChunk, joint_batch
from mmemb.training.objective import Objective, StepContext
from mmemb.types import Pair


class Joint(Objective, name="joint"):
    """Adds InfoNCE on the reasoned and the direct path to the next-token loss on rationale and decision.

    Args:
        chunk_size: queries per backward pass. The global batch has as many chunks as the batch size needs.
        direct_weight: lambda_d, weight of the direct path's InfoNCE.
        reasoned_weight: weight of the reasoned path's InfoNCE.
        next_token_weight: lambda_cot, weight of the mean next-token loss.
        infonce: temperature of the contrastive loss (learnable and clamped, or fixed).
        augment: picture augmentation. null means none.
        kept_graphs: number of chunks whose graphs may be in memory at once. Each one after the first saves a forward
            pass, so set it as high as memory allows.

    Raises:
        ValueError: ``chunk_size`` or ``kept_graphs`` is below one.
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
        kept_graphs: int = 1,
    ) -> None:
        super().__init__()
        check_numbers("joint", at_least=1, chunk_size=chunk_size, kept_graphs=kept_graphs)
        self.chunk_size = chunk_size
        self.direct_weight = direct_weight
        self.reasoned_weight = reasoned_weight
        self.next_token_weight = next_token_weight
        self.infonce = infonce if infonce is not None else InfoNCE()
        self.augment = augment
        self.kept_graphs = kept_graphs
        self._choose: Choose | None = None

    def setup(self, context: SetupContext) -> None:
        if context.choose is not None:
            self._choose = context.choose

    def collate(self, model: Model, pairs: Sequence[Pair], seed: int) -> TrainBatch:
        return joint_batch(model, pairs, seed, choose=self._choose, chunk_size=self.chunk_size, augment=self.augment)

    def step(self, model: Model, batch: TrainBatch, context: StepContext) -> dict[str, Tensor]:
        device = batch.query_id.device
        tokens = torch.stack([chunk.query.written() for chunk in batch.chunks]).sum()
        total = all_sum(tokens.to(device)).clamp(min=1)
        # Data-parallel training averages gradients over ranks. The factor world size turns this into the global mean.
        token_scale = self.next_token_weight * world_size() / total
        written = torch.zeros((), device=device)

        def forward(chunk: TrainChunk, final: bool) -> ChunkOutput:
            chunk = chunk.to(device)
            query = chunk.query.encode(model, write=final and bool(self.next_token_weight))
            target = model.backbone(chunk.target)
            embeddings = {
                "query": query.direct,
                "target": model.pooler(target, chunk.target.tensors["attention_mask"], chunk.target.emb_position),
            }
            if query.reasoned is not None:
                embeddings["reasoned"] = query.reasoned
            if query.nll is None:
                return ChunkOutput(embeddings)
            written.add_(query.nll.detach())
            return ChunkOutput(embeddings, loss=query.nll * token_scale)

        def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
            return self._contrast(embeddings, batch)

        result = cached_step(
            batch.chunks,
            forward,
            loss,
            backward=context.backward,
            no_sync=context.no_sync,
            kept_graphs=self.kept_graphs,
        )
        logs = {key: torch.as_tensor(value).detach() for key, value in result.logs.items()}
        logs["next_token"] = all_sum(written) / total
        logs["loss"] = result.loss.detach() + self.next_token_weight * logs["next_token"]
        logs["temperature"] = self.infonce.temperature.detach()
        return logs

    def _contrast(self, embeddings: dict[str, Tensor], batch: TrainBatch) -> CachedLoss:
        """Computes both InfoNCE terms over the global batch, with the gradients of embeddings and temperature."""
        device = embeddings["query"].device
        offsets = torch.tensor([0, *[len(chunk.query) for chunk in batch.chunks]]).cumsum(0)
        rows = torch.cat([chunk.query.rows + int(start) for chunk, start in zip(batch.chunks, offsets, strict=False)])
        weight = torch.cat([chunk.reasoned_weight for chunk in batch.chunks])
        paths = [
            PathLoss("direct", "query", self.direct_weight, torch.arange(len(embeddings["query"]), device=device)),
            PathLoss("reasoned", "reasoned", self.reasoned_weight, rows.to(device), weight.to(device)),
        ]
        return contrast(self.infonce, embeddings, batch, paths)
