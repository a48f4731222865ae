"""All memory of a cached step, its loss included, against the number of chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import harness
from mmemb.kernels import release_workspace
from mmemb.losses import CachedLoss, ChunkOutput, InfoNCE, cached_step


def test_memory_of_a_step_grows_by_embeddings_alone() -> None:
    width, count_of = 64, (8, 32)
    contrast = InfoNCE(temperature=0.1, workspace_mib=1)
    encode = nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, width))

    def peak(count: int) -> float:
        x, y = torch.randn(2, 64 * count, 6)
        chunks = list(zip(x.split(64), y.split(64), strict=True))

        def forward(piece: tuple[Tensor, Tensor], final: bool) -> ChunkOutput:
            return ChunkOutput(dict(zip(("query", "target"), map(encode, piece), strict=True)))

        def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
            found = contrast.with_grads(embeddings["query"], embeddings["target"])
            gradients = {"query": found.query_grad, "target": found.candidate_grad}
            return CachedLoss(found.loss, gradients, contrast.temperature_term(found))

        cached_step(chunks[:1], forward, loss)  # makes the parameters' gradients
        release_workspace()
        return 1e6 * harness.peak_megabytes(lambda: cached_step(chunks, forward, loss), device="cpu")

    small, large = map(peak, count_of)
    rows = 64 * (count_of[1] - count_of[0])
    # A row is a query and a target: embeddings, gradients, and what the loss and the joining of chunks copy.
    assert large - small < 8 * 2 * rows * width * 4
    assert large < (64 * count_of[1]) ** 2 * 4  # the matrix
