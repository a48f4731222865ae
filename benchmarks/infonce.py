"""InfoNCE loss and both gradients against naive torch and the bare matrix products, in the same repetition.

    python -m benchmarks.infonce [--smoke] [--device cpu] [--repeats 5] [--output FOLDER]

The floor is three matrix products of N x M x D: S, dQ and dK, by stripes into buffers that exist already. The symmetric
loss needs a fourth and is measured against the same floor.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from mmemb.kernels import infonce_with_grads, reference
from mmemb.kernels._infonce_tiled import ROWS

TEMPERATURE = 0.05


def floor(query: Tensor, candidate: Tensor) -> Callable[[], None]:
    """The three products alone."""
    rows = min(ROWS, len(query))
    logits = query.new_empty(rows, len(candidate))
    query_grad, candidate_grad = torch.empty_like(query), torch.zeros_like(candidate)

    def run() -> None:
        for start in range(0, len(query), rows):
            stripe = query[start : start + rows]
            part = torch.mm(stripe, candidate.T, out=logits[: len(stripe)])
            torch.mm(part, candidate, out=query_grad[start : start + rows])
            candidate_grad.addmm_(part.T, stripe)

    return run


def naive(query: Tensor, candidate: Tensor, *, symmetric: bool) -> tuple[Tensor, ...]:
    """Full matrix and autograd."""
    leaves = [x.detach().requires_grad_() for x in (query, candidate)]
    loss = reference.infonce(leaves[0], leaves[1], temperature=TEMPERATURE, symmetric=symmetric)
    return torch.autograd.grad(loss, leaves)


def measure(
    n: int, width: int, dtype: torch.dtype, *, symmetric: bool, repeats: int, device: str
) -> list[dict[str, Any]]:
    """One row a rival."""
    torch.manual_seed(0)
    query, candidate = (normalize(torch.randn(n, width, device=device), dim=1).to(dtype) for _ in range(2))
    rivals: dict[str, Callable[[], object]] = {
        "mmemb": lambda: infonce_with_grads(query, candidate, temperature=TEMPERATURE, symmetric=symmetric),
        "naive": lambda: naive(query, candidate, symmetric=symmetric),
    }
    times = harness.paired({"floor": floor(query, candidate), **rivals}, repeats=repeats, device=device)
    return [
        {
            "rival": name,
            "n": n,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "symmetric": symmetric,
            "seconds": statistics.median(times[name]),
            "ratio_to_floor": harness.median_ratio(times[name], times["floor"]),
            "tflops": (8 if symmetric else 6) * n * n * width / statistics.median(times[name]) / 1e12,
            "peak_mb": harness.peak_megabytes(function, device=device),
        }
        for name, function in rivals.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and appends to ``infonce.jsonl``."""
    options = harness.arguments(str(__doc__), argv)
    if options.smoke:
        sizes, widths = [64], [16]
    elif options.device == "cpu":
        sizes, widths = [2048, 8192], [256, 1024]
    else:
        sizes, widths = [2048, 8192, 32768], [256, 1024, 2048]
    rows: list[dict[str, Any]] = []
    for n, width, dtype, both in itertools.product(sizes, widths, [torch.float32, torch.bfloat16], [False, True]):
        rows += measure(n, width, dtype, symmetric=both, repeats=options.repeats, device=options.device)
    path = harness.append(rows, output=options.output, name="infonce", smoke=options.smoke, device=options.device)
    print(harness.table(rows), f"appended to {path}", sep="\n")


if __name__ == "__main__":
    main()
