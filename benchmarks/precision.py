"""Measures the error of the loss's gradients when embeddings share a mean direction, as trained embeddings do.

    python -m benchmarks.precision

The inputs are rows with a given width and mean cosine, rounded to a dtype. Each engine, and `mmemb.kernels.reference`
with autograd in that dtype (`naive`), is compared with float64 on the same inputs. A row of the results has the largest
relative error (by norm) of the embeddings' gradients and of the temperature's gradient, over both directions and all
draws. On a CPU, Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import append, bar, parser, table
from mmemb.kernels import InfoNCEBatch, LossOptions, infonce_with_grads, reference

TEMPERATURE = 0.05
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COSINES = (0.9, 0.99, 0.999)
Rival: TypeAlias = Literal["tiled", "triton", "naive"]
RIVALS: tuple[Rival, ...] = get_args(Rival)


def rows(n: int, width: int, cosine: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries and candidates [n, width] in float64, of length 1; two rows have this cosine on average."""
    mean, query, candidate = (
        normalize(torch.randn(each, width, dtype=torch.float64, generator=generator), dim=1) for each in (1, n, n)
    )
    share, rest = cosine**0.5, (1 - cosine) ** 0.5
    return normalize(share * mean + rest * query, dim=1), normalize(share * mean + rest * candidate, dim=1)


def gradients(query: Tensor, candidate: Tensor, *, symmetric: bool) -> list[Tensor]:
    """Gradients of query, candidate and temperature, by autograd through the definition in the inputs' dtype."""
    temperature = torch.tensor(TEMPERATURE, dtype=query.dtype, device=query.device)
    leaves = [each.clone().requires_grad_() for each in (query, candidate, temperature)]
    loss = reference.infonce(leaves[0], leaves[1], temperature=leaves[2], symmetric=symmetric)
    return list(torch.autograd.grad(loss, leaves))


def measure(rival: Rival, dtype: str, cosine: float, *, n: int, width: int, draws: int, device: str) -> dict[str, Any]:
    """Measures the largest relative errors of one rival over ``draws`` draws of n rows with this width."""
    worst = [0.0, 0.0]
    for draw, symmetric in product(range(draws), (False, True)):
        made = rows(n, width, cosine, torch.Generator().manual_seed(draw))
        query, candidate = (each.to(device, DTYPES[dtype]) for each in made)
        if rival == "naive":
            given = gradients(query, candidate, symmetric=symmetric)
        else:
            options = LossOptions(symmetric=symmetric, engine=rival)
            found = infonce_with_grads(InfoNCEBatch(query, candidate, TEMPERATURE), options)
            given = [found.query_grad, found.candidate_grad, found.temperature_grad]
        exact = gradients(query.double(), candidate.double(), symmetric=symmetric)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(given, exact, strict=True)]
        worst = [max(worst[0], *errors[:2]), max(worst[1], errors[2])]
    return {
        "rival": rival,
        "dtype": dtype,
        "cosine": cosine,
        "embedding_error": worst[0],
        "temperature_error": worst[1],
        "n": n,
        "width": width,
        "draws": draws,
        "temperature": TEMPERATURE,
    }


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = parser((__doc__ or "").split("\n", 1)[0])
    made.set_defaults(repeats=3)
    options = made.parse_args(argv)
    cases = list(product(DTYPES, COSINES, RIVALS))
    if options.smoke:
        cases, options.repeats = cases[:3], 1
    size = {"n": 12, "width": 8} if options.smoke else {"n": 500, "width": 128}
    found = []
    # In a separate process, since Triton reads TRITON_INTERPRET when it is imported.
    start = _interpret if options.device == "cpu" else None
    progress, advance = bar("precision", len(cases))
    with progress, ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as pool:
        for dtype, cosine, rival in cases:
            shared = {**size, "draws": options.repeats, "device": options.device}
            found.append(pool.submit(measure, rival, dtype, cosine, **shared).result())
            advance(f"{dtype}, {cosine}, {rival}")
    append(found, output=options.output, name="precision", smoke=options.smoke, device=options.device)
    print(table(found, columns=["dtype", "cosine", "rival", "embedding_error", "temperature_error"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
