"""A whole optimiser step at a large batch: gradient cache against one plain backward pass, time and peak memory.

    python -m benchmarks.gradcache [--smoke] [--device cpu] [--repeats 5] [--output FOLDER]

The encoder is a deep perceptron whose activations outweigh its embeddings, as a language model's do. The cache encodes
all chunks but one twice: at least 4/3 of the plain step (a backward pass costs two forward passes), more where small
chunks use the machine less well.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks import harness
from mmemb.losses import CachedLoss, ChunkOutput, InfoNCE, cached_step

PLAIN_LIMIT = {"cpu": 4096, "cuda": 65536}
"""Largest batch that the plain step is asked to hold."""


def encoder(width: int, depth: int) -> nn.Module:
    """``depth`` layers of ``width`` with an embedding of 64."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(width, 64))


def steps(batch: int, chunk: int, width: int, depth: int, device: str) -> dict[str, Callable[[], None]]:
    """The two ways to an optimiser step."""
    torch.manual_seed(0)
    net, loss = encoder(width, depth).to(device), InfoNCE().to(device)
    optimizer = torch.optim.AdamW([*net.parameters(), *loss.parameters()], lr=1e-4)
    query, target = torch.randn(2, batch, width, device=device)

    def encode(x: Tensor) -> Tensor:
        return normalize(net(x), dim=1)

    def forward(rows: slice, final: bool) -> ChunkOutput:
        return ChunkOutput({"query": encode(query[rows]), "target": encode(target[rows])})

    def all_rows(embeddings: dict[str, Tensor]) -> CachedLoss:
        result = loss.with_grads(embeddings["query"], embeddings["target"])
        gradients = {"query": result.query_grad, "target": result.candidate_grad}
        return CachedLoss(result.loss, gradients, loss.temperature_term(result))

    def cached() -> None:
        cached_step([slice(start, start + chunk) for start in range(0, batch, chunk)], forward, all_rows)
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> None:
        loss(encode(query), encode(target)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"cached": cached} | ({"plain": plain} if batch <= PLAIN_LIMIT[device] else {})


def measure(batch: int, chunk: int, *, width: int, depth: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """One row a way."""
    ways = steps(batch, chunk, width, depth, device)
    times = harness.paired(ways, repeats=repeats, device=device)
    return [
        {
            "rival": name,
            "batch": batch,
            "chunk": chunk,
            "width": width,
            "depth": depth,
            "seconds": statistics.median(times[name]),
            "ratio_to_plain": harness.median_ratio(times[name], times["plain"]) if "plain" in times else None,
            "peak_mb": harness.peak_megabytes(step, device=device),
        }
        for name, step in ways.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and appends to ``gradcache.jsonl``."""
    options = harness.arguments(str(__doc__), argv)
    batches, width, depth = ([16], 16, 2) if options.smoke else ([64, 256, 1024, 4096, 8192], 256, 8)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        chunk = 4 if options.smoke else 32
        rows += measure(batch, chunk, width=width, depth=depth, repeats=options.repeats, device=options.device)
    path = harness.append(rows, output=options.output, name="gradcache", smoke=options.smoke, device=options.device)
    print(harness.table(rows), f"appended to {path}", sep="\n")


if __name__ == "__main__":
    main()
