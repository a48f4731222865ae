"""Compares batched sampling of rationales into a pool with one sample at a time by the library's `generate`.

    python -m benchmarks.generate [--smoke] [--device cpu] [--repeats 5] [--pairs 128] [--candidates 4]

The `model` worker with the `tiny` model writes K candidates for each of N queries of the bundled data into a pool. The
rival asks `model.generate` for each of the N x K samples, one at a time, with the same prompt, temperature and maximum
number of tokens. Samples per second and their ratio use the wall clock, because only the clock shows that two cores
wait for each other. CPU seconds (on a GPU, seconds between its events) are in other columns. Ratios are rival / pool in
the same repetition.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.workers.model import ModelWorker
from mmemb.data.bundled import load_pairs
from mmemb.rationales.generate import generate
from mmemb.types import END_THINK, THINK, Pair

_TASKS = ("name", "fact", "flagattr", "left1")
_TOKENS = 40


def distinct_pairs(count: int) -> list[Pair]:
    """Pairs of several tasks whose prompts differ, so that the worker cannot share a prompt between two of them."""
    found: dict[object, Pair] = {}
    each = -(-count // len(_TASKS))
    for task in _TASKS:
        here: dict[object, Pair] = {}
        for pair in load_pairs("train", tasks=[task]):
            here.setdefault(pair.query.parts if task == "fact" else pair.query.parts[0], pair)
        found |= dict([(key, pair) for key, pair in here.items() if key not in found][:each])
    return list(found.values())[:count]


def one_at_a_time(worker: ModelWorker, backbone: TinyBackbone, pairs: Sequence[Pair], k: int) -> list[str]:
    """Samples N x K texts one by one with the library's loop."""
    think = torch.tensor([[backbone.token_id(THINK)]], device=backbone.device)
    ends = [backbone.token_id(END_THINK), *backbone.special_ids]
    torch.manual_seed(0)
    texts = []
    for pair in pairs:
        for _ in range(k):
            tensors = backbone.prepare([worker.prompt(pair.query)], embed=False).to(backbone.device).tensors
            pictures = {name: value for name, value in tensors.items() if name in ("pixel_values", "image_grid_thw")}
            ids = torch.cat([tensors["input_ids"], think], dim=1)
            model: Any = backbone.model
            with torch.no_grad():
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                    **pictures,
                    do_sample=True,
                    temperature=worker.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=_TOKENS,
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                )
            texts.append(backbone.decode(written[0, ids.shape[1] :].tolist()))
    return texts


def measure(*, pairs: int, candidates: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Measures both methods; one row per method."""
    backbone = TinyBackbone().to(device).eval()
    worker = ModelWorker(backbone, max_new_tokens=_TOKENS)
    rows = distinct_pairs(pairs)
    folder = Path(tempfile.mkdtemp(prefix="mmemb-generate-"))

    def pooled() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        generate(rows, [worker], candidates, pool=folder, seed=0, progress=False)

    ways: dict[str, Callable[[], object]] = {
        "pool": pooled,
        "one_at_a_time": lambda: one_at_a_time(worker, backbone, rows, candidates),
    }
    try:
        times, walls = harness.paired_clocks(ways, repeats=repeats, device=device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        {
            "rival": name,
            "pairs": len(rows),
            "candidates": candidates,
            "wall_seconds": statistics.median(walls[name]),
            f"{device}_seconds": statistics.median(times[name]),
            "samples_per_wall_second": len(rows) * candidates / statistics.median(walls[name]),
            "wall_ratio_to_pool": harness.median_ratio(walls[name], walls["pool"]),
            f"{device}_ratio_to_pool": harness.median_ratio(times[name], times["pool"]),
        }
        for name in ways
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and appends to ``generate.jsonl``."""
    made = harness.parser(str(__doc__))
    made.add_argument("--pairs", type=int, default=128, help="queries (default: %(default)s)")
    made.add_argument("--candidates", type=int, default=4, help="samples per query (default: %(default)s)")
    options = made.parse_args(argv)
    pairs, candidates = (4, 2) if options.smoke else (options.pairs, options.candidates)
    rows = measure(pairs=pairs, candidates=candidates, repeats=options.repeats, device=options.device)
    path = harness.append(rows, output=options.output, name="generate", smoke=options.smoke, device=options.device)
    print(harness.table(rows), f"appended to {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
