"""Compares a step of the control phase with one of the joint phase: peak memory and time, same model, same pairs.

    python -m benchmarks.phases [--smoke] [--device cpu] [--repeats 3] [--output FOLDER]

The bundled model takes the steps of recipes/r1.yaml with N pairs of the control split. The joint phase uses chunks of
16 and the true rationales. The control phase uses 8 rollouts per query in chunks of 4 queries. Of the two other rows,
`joint, graphs kept` keeps the chunks' graphs. `joint, paths apart` encodes both paths as a whole instead of continuing
from one pass over the prompt. The optimiser and its state are left out, since they are the same for all. Prints the
rows and appends them to `phases.jsonl`; docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import harness
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.data.bundled import evaluation_tasks, load_pairs
from mmemb.interfaces import Model, SetupContext
from mmemb.training.control.objective import Control
from mmemb.training.joint.objective import Joint
from mmemb.training.objective import Objective, StepContext
from mmemb.types import Pair, Rationale

LAST = 9
"""Step number at which the control phase is measured; work that its first step does once is done in the warm-up."""


def true_rationale(pair: Pair, seed: int) -> Sequence[tuple[Rationale, float]]:
    """The rationale of the bundled query itself, with weight one."""
    return [(Rationale(pair.query.fields["rationale"]), 1.0)]


def step(objective: Objective, model: Model, pairs: Sequence[Pair], *, shared: bool = True) -> Callable[[], None]:
    """Makes a function that computes one step's parameter gradients, including collation.

    ``shared`` says whether both paths share the prompt's pass.
    """

    def run() -> None:
        for parameter in model.backbone.parameters():
            parameter.grad = None
        with mock.patch.object(TinyBackbone, "keeps_cache_in_training", shared):
            batch = objective.collate(model, pairs, 0).to(model.backbone.device)
        objective.step(model, batch, StepContext(step=LAST, steps=LAST + 1))

    return run


def measure(
    *, count: int, chunk: int, queries: int, group: int, budget: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Measures all phases; one row per phase, with the joint phase first."""
    torch.manual_seed(0)
    model = Model.assemble(TinyBackbone().to(device), EmbedToken())
    tasks = evaluation_tasks("control")
    # The tasks take turns, so that there are prompts and rationales of every length.
    of_task = [[pair for pair in load_pairs("control") if pair.task == task.name] for task in tasks]
    pairs = [each[row] for row in range(-(-count // len(tasks))) for each in of_task][:count]
    joint = Joint(chunk_size=chunk).to(device)
    joint.setup(SetupContext(choose=true_rationale))
    kept = Joint(chunk_size=chunk, kept_graphs=-(-count // chunk)).to(device)
    kept.setup(SetupContext(choose=true_rationale))
    control = Control(chunk_size=queries, group_size=group, max_new_tokens=budget, show_every=0).to(device)
    control.setup(SetupContext(tasks=tasks, previous=joint))
    steps = {
        "joint": step(joint, model, pairs),
        "control": step(control, model, pairs),
        "joint, graphs kept": step(kept, model, pairs),
        "joint, paths apart": step(joint, model, pairs, shared=False),
    }
    steps["control"]()  # embeds its candidates, which happens once in many steps
    times = harness.paired(steps, repeats=repeats, device=device)
    peaks = {}
    for name, run in steps.items():
        model.backbone.zero_grad()  # otherwise freed gradients would count in some rows only
        peaks[name] = harness.peak_megabytes(run, device=device)
    return [
        {
            "phase": name,
            "pairs": count,
            "chunk": queries if name == "control" else chunk,
            "rollouts": count * group if name == "control" else 0,
            "seconds": statistics.median(times[name]),
            "ratio_to_joint": harness.median_ratio(times[name], times["joint"]),
            "peak_mb": peaks[name],
            "peak_to_joint": peaks[name] / peaks["joint"],
        }
        for name in steps
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the rows and appends them to ``phases.jsonl``."""
    options = harness.arguments(str(__doc__), argv)
    sizes = (
        {"count": 4, "chunk": 2, "queries": 2, "group": 2, "budget": 3}
        if options.smoke
        else {"count": 64, "chunk": 16, "queries": 4, "group": 8, "budget": 48}
    )
    found = measure(repeats=options.repeats, device=options.device, **sizes)
    path = harness.append(found, output=options.output, name="phases", smoke=options.smoke, device=options.device)
    print(harness.table(found), f"appended to {path}", sep="\n\n")


if __name__ == "__main__":
    main()
