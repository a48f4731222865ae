"""What an evaluator saves by encoding a pair's prompt once for all its arms, against once an arm.

    python -m benchmarks.score

Scores pairs of the bundled data with the `tiny` model, each without a rationale, with every candidate of the bundled
pool and with as many placebos, by both evaluators; the rival is given the same rows with copies of the pairs, which
share nothing. Ratios are rival / shared in the same repetition.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness import append, median_ratio, paired, parser, table
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.evaluators.judge import JudgeEvaluator
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.data.bundled import load_pairs
from mmemb.data.pool import RationalePool
from mmemb.interfaces import Evaluator
from mmemb.types import Pair

_TASKS = ("name", "flagattr", "left1", "findscene")


def evaluators(device: str) -> dict[str, Evaluator]:
    """Both, on the shipped model. It was never taught to say yes or no; which two words are compared costs the same."""
    backbone, pooler = TinyBackbone().to(device), EmbedToken()
    pooler.build(backbone.hidden_size)
    yes, no, *_ = (word for word in ("red", "apple", "dog", "left", "of") if len(backbone.tokenize(word)) == 1)
    found: dict[str, Evaluator] = {"retrieval": RetrievalEvaluator(), "judge": JudgeEvaluator(yes=yes, no=no)}
    for evaluator in found.values():
        evaluator.bind(backbone, pooler)
    return found


def rows_of(pairs: Sequence[Pair], *, most: int) -> tuple[list[Pair], list[str | None]]:
    """Every arm of the pairs: none, up to ``most`` candidates of the pool, and the next pair's as placebos."""
    pool = RationalePool.open("bundled:pool")
    texts = [
        [each.text for each in pool.candidates(pair.id).rationales[:most]] or [pair.positive.text] for pair in pairs
    ]
    arms = [[None, *own, *other] for own, other in zip(texts, texts[1:] + texts[:1], strict=True)]
    repeated = [pair for pair, some in zip(pairs, arms, strict=True) for _ in some]
    return repeated, [text for some in arms for text in some]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an evaluator and task."""
    rows = []
    each = 4 if options.smoke else options.pairs
    for kind, evaluator in evaluators(options.device).items():
        for task in _TASKS[:2] if options.smoke else _TASKS:
            pairs = load_pairs("train", tasks=[task])[:each]
            shared, texts = rows_of(pairs, most=5)
            # Other objects of the same content: nothing tells the evaluator that their prompts are the same.
            apart = [replace(pair, query=replace(pair.query)) for pair in shared]
            evaluator.prepare_bank(pairs)

            rivals = {
                name: functools.partial(evaluator.score, some, texts)
                for name, some in (("shared", shared), ("apart", apart))
            }
            found = [rival() for rival in rivals.values()]
            times = paired(rivals, repeats=options.repeats, device=options.device)
            rows.append(
                {
                    "evaluator": kind,
                    "task": task,
                    "pairs": len(pairs),
                    "arms a pair": len(shared) / len(pairs),
                    "rows/s shared": len(shared) / min(times["shared"]),
                    "ratio": median_ratio(times["apart"], times["shared"]),
                    "largest difference": max(abs(a - b) for a, b in zip(*found, strict=True)),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = parser(__doc__ or "")
    made.add_argument("--pairs", type=int, default=64, help="pairs a task (default: %(default)s)")
    options = made.parse_args(argv)
    rows = measure(options)
    append(rows, output=options.output, name="score", smoke=options.smoke, device=options.device)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
