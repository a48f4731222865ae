"""Tests whether selection works: trains with each selector on a pool of which half is corrupted.

All selectors train on the bundled tasks, for the same number of steps and with several seeds.

    python -m benchmarks.selectors
    python -m benchmarks.selectors --steps 300 --tasks flagattr left1 --pairs 200 --seeds 1
    python -m benchmarks.selectors --selectors random counterfactual my_module.MySelector

1. It makes a pool of two candidates per pair: the row's own rationale (`metadata`), and a damaged copy (`corrupting`).
2. It trains an embedder to score the pool: the joint phase on randomly chosen candidates, so that the embedder knows no
   more than the pool. It scores twice: with `retrieval` alone, and checked by `plausible` with the embedder as writer.
3. It compares what each selector keeps and chooses by each score with the known corruption.
4. For every selector and seed it runs recipes/r1.yaml on that pool and its `plausible` scores, and evaluates on the
   test split.

Prints both tables and writes `benchmarks/results/selectors.json`. Finished work is not repeated, so a stopped benchmark
continues where it was. Pool, embedder and runs are in a folder named by everything that they depend on, so other
options start from the beginning. ``none`` trains only the direct path.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import r1_seeds
from benchmarks.harness import environment, parser, table
from mmemb.common.digests import digest
from mmemb.common.files import write_text
from mmemb.common.vocabulary import ALWAYS_REASON, NEVER
from mmemb.data.pairs import read_pairs
from mmemb.data.sources import Source
from mmemb.interfaces import Selector
from mmemb.rationales.choose import choose
from mmemb.rationales.gains import surviving
from mmemb.rationales.pool import RationalePool
from mmemb.registry import create, resolve
from mmemb.types import Pair

SELECTORS = ("none", "random", "counterfactual", "best_of", "oracle")
NEEDS_REASONING = ("fact", "flagattr", "left1", "flagscene")
"""Tasks whose answer is not in the picture: they need a step that a rationale can spell out."""
MARGINS = {"plausible": -0.05, "retrieval": 0.0}
"""Margin of the gain by evaluator, in nats. For checked texts it is enough that they do no harm: if the direct path
finds the target without help, the sign of a gain is chance. Training uses the first evaluator."""
_DRAWS = 16
_CORRUPTING = {"class_path": "corrupting", "init_args": {"worker": "metadata", "share": 1.0}}


# -- settings ----------------------------------------------------------------------------------------------------------


def overlay(
    tasks: Sequence[str], *, steps: int, pairs: int | None = None, queries: int | None = None
) -> dict[str, Any]:
    """The settings of recipes/r1.yaml that every run changes: length, tasks (with the recipe's weights), no validation.

    Args:
        tasks: tasks that are trained and tested.
        steps: number of training steps.
        pairs: training pairs of each task, for pool and training; None for all.
        queries: test queries of each task; None for all.
    """
    recipe = yaml.safe_load(r1_seeds.RECIPE.read_text(encoding="utf-8"))
    sources = []
    for source in recipe["data"]["train"]:
        named = [task for task in source["tasks"] if task in tasks]
        if named:
            sources.append({**source, "tasks": named, **({"limit": pairs} if pairs else {})})
    known = {task for source in recipe["data"]["train"] for task in source["tasks"]}
    if unknown := set(tasks) - known:
        raise ValueError(f"--tasks {' '.join(sorted(unknown))}: the recipe has {', '.join(sorted(known))}")
    test = [{"path": "bundled:test", "tasks": list(tasks), **({"limit": queries} if queries else {})}]
    return {
        "trainer": {"max_steps": steps, "limit_val_batches": 0},
        "model": {"control": None, "controllers": ["never", "always_reason"], "reference": None},
        "data": {"train": sources, "control": None, "validation": [], "test": test},
    }


def write(path: Path, content: Any) -> Path:
    """Writes a YAML file completely or not at all; returns the path."""
    return write_text(path, yaml.safe_dump(content))


def mmemb(*words: str) -> None:
    """Runs an mmemb command in a separate process.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    subprocess.run([sys.executable, "-m", "mmemb", *words], check=True)


# -- the pool ----------------------------------------------------------------------------------------------------------


def make_pool(folder: Path, settings: dict[str, Any], *, evaluator_steps: int) -> Path:
    """Makes the scored pool; keeps parts that exist already."""
    place = folder / "pool"
    pool = {"path": str(place), "workers": ["metadata", _CORRUPTING], "candidates": 1}
    made = write(folder / "pool.yaml", {**settings, "model": {**settings["model"], "pool": pool}})
    configs = ["--config", str(r1_seeds.RECIPE), "--config", str(made)]
    mmemb("rationales", "generate", *configs)
    embedder = folder / "embedder"
    checkpoint = embedder / "checkpoints" / "last.ckpt"
    if not (embedder / "done").is_file():
        last = ["--ckpt_path", str(checkpoint)] if checkpoint.is_file() else []
        mmemb(
            *["fit", *configs, "--model.selector", "random", "--seed_everything", "11", "--evaluate", "false"],
            *["--trainer.max_steps", str(evaluator_steps), "--trainer.logger.save_dir", str(folder)],
            *["--trainer.logger.name", embedder.name, "--trainer.logger.version", "", *last],
        )
        (embedder / "done").touch()
    retrieval = {"class_path": "retrieval", "init_args": {"embedder": str(checkpoint)}}
    checked = {"class_path": "plausible", "init_args": {"evaluator": retrieval, "writer": str(checkpoint)}}
    for evaluator in (retrieval, checked):
        scored = {**settings["model"], "pool": {**pool, "evaluator": evaluator}}
        also = write(folder / f"score_{evaluator['class_path']}.yaml", {**settings, "model": scored})
        mmemb("rationales", "score", "--config", str(r1_seeds.RECIPE), "--config", str(also))
    return place


# -- selection against the known corruption ----------------------------------------------------------------------------


@dataclass
class Selected:
    """The shares of good and corrupted candidates that a selector keeps; None where the selector does not decide.

    Attributes:
        evaluator: the evaluator whose scores the selector sees.
        selector: the selector's name.
        task: the task, or ``reasoning`` for the tasks that need it, or ``all``.
        precision: share of good candidates among those chosen.
        recall: share of pairs for which a good candidate is chosen, among the pairs that have one.
        keeps_good: share of good candidates whose gain exceeds the margin.
        rejects_corrupted: share of corrupted candidates whose gain does not exceed the margin.
        rejects_wrong_entity: the same share, among candidates about another item.
        rejects_empty_talk: the same share, among candidates that say nothing.
        rejects_shuffled: the same share, among candidates with the words in another order, which may still help an
            embedder.
        none: median log-probability of the target without a rationale, in nats; near 0 there is nothing to gain.
    """

    evaluator: str
    selector: str
    task: str
    precision: float | None
    recall: float | None
    keeps_good: float | None
    rejects_corrupted: float | None
    rejects_wrong_entity: float | None
    rejects_empty_talk: float | None
    rejects_shuffled: float | None
    none: float


def selector_of(name: str, margin: float | None = None) -> Selector:
    """Builds a selector by short name or class path, with its defaults except for the margin, if it has one.

    Raises:
        ValueError: there is no such selector.
    """
    if "." not in name:
        made = create("selector", name)
    else:
        module, _, attribute = name.rpartition(".")
        try:
            made = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"--selectors {name}: {error}; give a selector class that needs no arguments") from None
    if not isinstance(made, Selector):
        raise ValueError(f"--selectors {name}: not a selector; give a class derived from Selector")
    if margin is not None and _takes_margin(made):
        made.margin = margin  # type: ignore[attr-defined]
    return made


def selection(
    pool: RationalePool, pairs: Sequence[Pair], tasks: Sequence[str], selectors: Sequence[str] = SELECTORS
) -> list[Selected]:
    """One entry per selector (other than ``none``) and task, with the evaluator with which the pool was opened."""
    groups = {task: [pair for pair in pairs if pair.task == task] for task in tasks}
    groups["reasoning"] = [pair for pair in pairs if pair.task in NEEDS_REASONING]
    groups["all"] = list(pairs)
    found = []
    for name in selectors:
        if name != "none":
            selector = selector_of(name, MARGINS.get(pool.evaluator or ""))
            found += [_selected(name, task, selector, pool, some) for task, some in groups.items() if some]
    return found


def _selected(name: str, task: str, selector: Selector, pool: RationalePool, pairs: Sequence[Pair]) -> Selected:
    chosen = good_chosen = have_good = 0
    kept_of: dict[str, list[bool]] = {}  # by kind of damage; "" for good candidates
    margin = getattr(selector, "margin", None)
    without: list[float] = []
    for pair in pairs:
        candidates = pool.candidates(pair.id)
        without.append(candidates.score_none)
        has_good = any(not each.corruption for each in candidates.rationales)
        for seed in range(_DRAWS):
            rationale = choose(pool, selector, pair.id, seed).rationale
            chosen += rationale is not None
            good_chosen += rationale is not None and not rationale.corruption
        have_good += _DRAWS * has_good
        if margin is not None:
            kept = surviving(candidates, margin=margin)
            for index, rationale in enumerate(candidates.rationales):
                kept_of.setdefault(rationale.corruption, []).append(index in kept)
    corrupted = [kept for damage, some in kept_of.items() if damage for kept in some]
    return Selected(
        evaluator=pool.evaluator or "",
        selector=name,
        task=task,
        precision=good_chosen / chosen if chosen else None,
        recall=good_chosen / have_good if have_good else None,
        keeps_good=_share(kept_of.get("", [])),
        rejects_corrupted=_rejected(corrupted),
        rejects_wrong_entity=_rejected(kept_of.get("wrong_entity", [])),
        rejects_empty_talk=_rejected(kept_of.get("empty_talk", [])),
        rejects_shuffled=_rejected(kept_of.get("shuffled", [])),
        none=statistics.median(without),
    )


def _share(kept: Sequence[bool]) -> float | None:
    return sum(kept) / len(kept) if kept else None


def _rejected(kept: Sequence[bool]) -> float | None:
    share = _share(kept)
    return None if share is None else 1 - share


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    selector: str, seed: int, *, folder: Path, settings: dict[str, Any], pool: Path, at_once: int
) -> dict[str, Any]:
    """Trains one run unless it is finished; returns its summary with its selector."""
    changes: dict[str, Any] = {"selector": None, "pool": None, "controllers": ["never"]}
    if selector != "none":
        changes = {"selector": _with_margin(selector), "pool": {"path": str(pool)}}  # the first evaluator by name
    made = write(folder / f"{selector}.yaml", {**settings, "model": {**settings["model"], **changes}})
    # Not the bare name, since a folder next to the configuration would be mistaken for the selector.
    found = r1_seeds.run(seed, folder=folder / f"runs_{selector}", at_once=at_once, extra=["--config", str(made)])
    return {"selector": selector, **found}


def _with_margin(selector: str) -> str | dict[str, Any]:
    margin = {"margin": MARGINS[min(MARGINS)]}
    return {"class_path": selector, "init_args": margin} if _takes_margin(selector_of(selector)) else selector


def _takes_margin(selector: Selector) -> bool:
    return "margin" in inspect.signature(type(selector)).parameters


def hits(runs: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Mean (and with several seeds, spread) of hit@1 over seeds, by selector, row and task, and the seconds."""
    rows = []
    for selector in dict.fromkeys(run["selector"] for run in runs):
        mine = [run for run in runs if run["selector"] == selector]
        for name in (NEVER, ALWAYS_REASON):
            if name not in mine[0]["modes"]:
                continue
            row: dict[str, Any] = {"selector": selector, "row": name}
            by_task = [run["modes"][name]["by_task"] for run in mine]
            for task in tasks:
                row[task] = _mean_and_spread(scores[task]["hit@1"] for scores in by_task)
            some = [task for task in tasks if task in NEEDS_REASONING]
            if some:
                row["reasoning"] = _mean_and_spread(
                    statistics.mean(scores[task]["hit@1"] for task in some) for scores in by_task
                )
            row["all"] = _mean_and_spread(run["modes"][name]["hit@1"] for run in mine)
            row["seconds"] = f"{statistics.mean(run['seconds'] for run in mine):.0f}"
            rows.append(row)
    return rows


def _mean_and_spread(values: Iterable[float]) -> str:
    every = list(values)
    spread = f"±{statistics.stdev(every):.3f}" if len(every) > 1 else ""
    return f"{statistics.mean(every):.3f}{spread}"


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options, and sets those that ``--smoke`` implies."""
    made = parser(__doc__ or "")
    every = [
        task for source in yaml.safe_load(r1_seeds.RECIPE.read_text())["data"]["train"] for task in source["tasks"]
    ]
    made.add_argument("--steps", type=int, default=400, help="training steps of a run (default: %(default)s)")
    made.add_argument(
        "--evaluator-steps", type=int, default=250, help="steps of the scoring embedder (default: %(default)s)"
    )
    made.add_argument("--tasks", nargs="+", default=every, help="tasks trained and tested (default: all)")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run per seed (default: 1 2 3)")
    made.add_argument("--pairs", type=int, help="training pairs of each task, for pool and training (default: all)")
    made.add_argument(
        "--selectors",
        nargs="+",
        metavar="NAME",
        default=list(SELECTORS),
        help=f"short names or class paths, or none for only the direct path (default: {' '.join(SELECTORS)})",
    )
    made.add_argument("--at-once", type=int, default=1, help="parallel runs; their times are then not comparable")
    made.add_argument("--folder", type=Path, default=Path("runs/selectors"), help="folder of pool and runs")
    options = made.parse_args(argv)
    for name in options.selectors:
        if name != "none":
            try:
                selector_of(name)
            except ValueError as error:
                made.error(str(error))
    if options.smoke:
        options.steps, options.evaluator_steps, options.pairs, options.seeds = 2, 2, 96, [1]
        options.tasks, options.folder = ["name", "flagattr"], options.folder / "smoke"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = options_of(argv)
    queries = 96 if options.smoke else None
    settings = overlay(options.tasks, steps=options.steps, pairs=options.pairs, queries=queries)
    scoring = [Path(str(inspect.getsourcefile(resolve("evaluator", name)))).read_text("utf-8") for name in MARGINS]
    made_from = r1_seeds.made_from([digest([settings, _CORRUPTING, scoring]), str(options.evaluator_steps)])
    folder = options.folder / f"{options.steps}_steps-{made_from}"
    place = make_pool(folder, settings, evaluator_steps=options.evaluator_steps)
    pairs = [pair for source in settings["data"]["train"] for pair in read_pairs(Source(**source))]
    chosen = []
    for evaluator in MARGINS:
        pool = RationalePool.open(place, evaluator=evaluator)
        chosen += selection(pool, pairs, options.tasks, options.selectors)
    print(table([asdict(each) for each in chosen]), flush=True)

    one = functools.partial(train, folder=folder, settings=settings, pool=place, at_once=options.at_once)
    jobs = [(selector, seed) for seed in options.seeds for selector in options.selectors]
    with ThreadPoolExecutor(options.at_once) as executor:
        runs = list(executor.map(lambda job: one(*job), jobs))
    runs.sort(key=lambda run: options.selectors.index(run["selector"]))
    rows = hits(runs, options.tasks)
    columns = dict.fromkeys(name for row in rows for name in row)
    print(table(rows, columns=list(columns)))
    asked = {
        name: getattr(options, name) for name in ("steps", "evaluator_steps", "tasks", "pairs", "seeds", "at_once")
    }
    result = {
        "settings": {**asked, "corrupted": 0.5, "draws": _DRAWS, "margins": MARGINS},
        "environment": environment(options.device),
        "selection": [asdict(each) for each in chosen],
        "hit@1": rows,
        "runs": runs,
    }
    path = options.output / f"selectors{'_smoke' if options.smoke else ''}.json"
    print(write_text(path, json.dumps(result, indent=1) + "\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
