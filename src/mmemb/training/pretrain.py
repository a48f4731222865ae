"""Next-token pretraining: turns random weights into a small VLM that can name, recall and caption.

Each pair is a prompt (the query item) and a response (the positive's text). Memory holds the activations of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.data.augment import PictureAugment
from mmemb.interfaces import Model
from mmemb.losses.collectives import all_sum, world_size
from mmemb.training.objective import Objective, StepContext, augmenter, next_token_loss
from mmemb.types import ModelInputs, Pair


@dataclass
class ResponseBatch:
    """Prompts with responses, cut into chunks. A step moves each chunk to the device just before it uses it."""

    chunks: list[ModelInputs]

    def to(self, device: torch.device) -> ResponseBatch:
        """Returns itself. Without this method, a trainer would move every chunk at once."""
        return self


class NextToken(Objective, name="next_token"):
    """Mean cross-entropy of the response tokens.

    Args:
        chunk_size: rows per backward pass.
        augment: picture augmentation. null means none.

    Raises:
        ValueError: ``chunk_size`` is below one.
    """

    def __init__(self, *, chunk_size: int = 32, augment: PictureAugment | None = None) -> None:
        super().__init__()
        check_numbers("pretrain", at_least=1, chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.augment = augment

    def collate(self, model: Model, pairs: Sequence[Pair], seed: int) -> ResponseBatch:
        # Rows of a task have similar lengths: sorted by task, a chunk has little padding.
        rows = sorted(enumerate(pairs), key=lambda row: row[1].task)
        chunks = []
        for start in range(0, len(rows), self.chunk_size):
            chunk = rows[start : start + self.chunk_size]
            inputs = model.backbone.prepare_response(
                [pair.query for _, pair in chunk],
                [pair.positive.text for _, pair in chunk],
                augment=augmenter(self.augment, [seed + number for number, _ in chunk]),
            )
            chunks.append(inputs)
        return ResponseBatch(chunks)

    def step(self, model: Model, batch: ResponseBatch, context: StepContext) -> dict[str, Tensor]:
        counts = torch.stack([(chunk.labels[:, 1:] != -100).sum() for chunk in batch.chunks])
        # Data-parallel training averages gradients over ranks. The factor world size turns this into the global mean.
        device = model.backbone.device
        total = all_sum(counts.sum().to(device)).clamp(min=1)
        scale = world_size() / total
        loss = torch.zeros((), device=device)
        for number, chunk in enumerate(batch.chunks):
            last = number == len(batch.chunks) - 1
            with nullcontext() if last else context.no_sync():
                chunk = chunk.to(device)
                part = next_token_loss(model.backbone, model.backbone(chunk), chunk)
                context.backward(part * scale)
            loss += part.detach()
        return {"loss": all_sum(loss) / total}
