"""Measures the gain from encoding a pair's prompt once for all arms of an evaluator instead of once per arm.

    python -m benchmarks.score

Every evaluator scores pairs of the bundled data with the `tiny` model: without a rationale, with every candidate of the
bundled pool, and with as many placebos. `plausible` scores an eighth of the pairs, because it does thirty times as much
work. The rival makes one plain forward pass over prompt and continuation for every arm, shares nothing and keeps no
cache. Rows per second and ratios (rival / shared, in the same repetition) use the wall clock. Another column has the
ratio of CPU seconds (on a GPU, of seconds between its events).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import append, median_ratio, paired_clocks, parser, table
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.evaluators.judge import JudgeEvaluator
from mmemb.components.evaluators.plausible import PlausibleEvaluator
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.data.bundled import load_pairs
from mmemb.inference import shared_prompts as inference
from mmemb.inference.encoder import evaluating
from mmemb.inference.prompts import length_order, pad_tokens
from mmemb.interfaces import Backbone, Evaluator, Model, SetupContext
from mmemb.rationales.pool import RationalePool
from mmemb.types import Item, ModelInputs, Pair

_TASKS = ("name", "flagattr", "left1", "findscene")


def evaluators(device: str) -> dict[str, Evaluator]:
    """All evaluators, with the shipped model.

    The model never learned to say yes or no, but the cost does not depend on the two words that the judge compares.
    """
    backbone, pooler = TinyBackbone().to(device), EmbedToken()
    model = Model.assemble(backbone, pooler)
    yes, no, *_ = (word for word in ("red", "apple", "dog", "left", "of") if len(backbone.tokenize(word)) == 1)
    found: dict[str, Evaluator] = {
        "retrieval": RetrievalEvaluator(),
        "judge": JudgeEvaluator(yes=yes, no=no),
        "plausible": PlausibleEvaluator(RetrievalEvaluator()),
    }
    for evaluator in found.values():
        evaluator.setup(SetupContext(model=model))
    return found


def rows_of(pairs: Sequence[Pair], *, most: int) -> tuple[list[Pair], list[str | None]]:
    """Every arm of the pairs: none, up to ``most`` candidates of the pool, and those of the next pair as placebos."""
    pool = RationalePool.open("bundled:pool")
    texts = [
        [each.text for each in pool.candidates(pair.id).rationales[:most]] or [pair.positive.text] for pair in pairs
    ]
    arms = [[None, *own, *other] for own, other in zip(texts, texts[1:] + texts[:1], strict=True)]
    repeated = [pair for pair, some in zip(pairs, arms, strict=True) for _ in some]
    return repeated, [text for some in arms for text in some]


def plain_states(
    backbone: Backbone, items: Sequence[Item], continuations: Sequence[Sequence[int]], *, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Does what `mmemb.inference.shared_prompts.continuation_states` does, with one whole pass per row."""
    order = length_order(items)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tails = [continuations[row] for row in rows]
        with evaluating(backbone):
            prompts = backbone.prepare([items[row] for row in rows], embed=False)
            tokens, mask = pad_tokens(tails, side="left", device=backbone.device)
            hidden = backbone(continued(prompts, tails).to(backbone.device))[:, -tokens.shape[1] :]
        yield rows, hidden, tokens, mask


def continued(prompts: ModelInputs, continuations: Sequence[Sequence[int]]) -> ModelInputs:
    """Appends token ids to prompts [B, T] and left-pads them again."""
    ids, mask, positions = (prompts.tensors[name] for name in ("input_ids", "attention_mask", "position_ids"))
    axes = positions if positions.ndim == 3 else positions[None]  # [3 or 1, B, T]
    lengths = mask.sum(1).tolist()
    width = max(length + len(tokens) for length, tokens in zip(lengths, continuations, strict=True))
    new_ids, new_mask = ids.new_zeros(len(ids), width), mask.new_zeros(len(ids), width)
    new_axes = axes.new_zeros(len(axes), len(ids), width)
    for row, (length, tokens) in enumerate(zip(lengths, continuations, strict=True)):
        cut = width - len(tokens)
        new_ids[row, cut - length : cut] = ids[row, -length:]
        new_ids[row, cut:] = torch.tensor(tokens)
        new_mask[row, cut - length :] = 1
        new_axes[:, row, cut - length : cut] = axes[:, row, -length:]
        new_axes[:, row, cut:] = axes[:, row].max() + 1 + torch.arange(len(tokens))
    made = {"input_ids": new_ids, "attention_mask": new_mask}
    made["position_ids"] = new_axes if positions.ndim == 3 else new_axes[0]
    return ModelInputs({**prompts.tensors, **made}, prompts.emb_position, torch.full_like(new_ids, -100))


def apart(evaluator: Evaluator, pairs: Sequence[Pair], texts: Sequence[str | None]) -> list[float]:
    """Scores with nothing shared. For `retrieval` copies of the pairs suffice: its rows are then whole sequences."""
    copies = [replace(pair, query=replace(pair.query)) for pair in pairs]
    with mock.patch.object(inference, "continuation_states", plain_states):
        return evaluator.score(copies, texts)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one row per evaluator and task."""
    rows = []
    each = 4 if options.smoke else options.pairs
    for kind, evaluator in evaluators(options.device).items():
        for task in _TASKS[:2] if options.smoke else _TASKS:
            pairs = load_pairs("train", tasks=[task])[: max(2, each // 8) if kind == "plausible" else each]
            shared, texts = rows_of(pairs, most=5)
            evaluator.setup(SetupContext(pairs=pairs))
            rivals = {
                "shared": functools.partial(evaluator.score, shared, texts),
                "apart": functools.partial(apart, evaluator, shared, texts),
            }
            found = [rival() for rival in rivals.values()]
            times, walls = paired_clocks(rivals, repeats=options.repeats, device=options.device)
            rows.append(
                {
                    "evaluator": kind,
                    "task": task,
                    "pairs": len(pairs),
                    "arms a pair": len(shared) / len(pairs),
                    "rows/s shared": len(shared) / min(walls["shared"]),
                    "wall ratio": median_ratio(walls["apart"], walls["shared"]),
                    f"{options.device} ratio": median_ratio(times["apart"], times["shared"]),
                    "largest difference": max(abs(a - b) for a, b in zip(*found, strict=True)),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = parser(__doc__ or "")
    made.add_argument("--pairs", type=int, default=64, help="pairs per task (default: %(default)s)")
    options = made.parse_args(argv)
    rows = measure(options)
    append(rows, output=options.output, name="score", smoke=options.smoke, device=options.device)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
