"""`mmemb rationales generate | score | stats | show`: makes or shows the rationale pool of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn

from mmemb.commands.parsing.errors import UsageError
from mmemb.common import terminal

_EPILOG = """The training config says which data, backbone, workers and evaluator to use, and where the pool is:

  mmemb rationales generate --config recipes/r1.yaml --model.pool.path pools/mine --model.pool.workers [metadata,model]
  mmemb rationales score    --config recipes/r1.yaml --model.pool.path pools/mine --model.pool.evaluator retrieval
  mmemb rationales stats    --config recipes/r1.yaml --model.pool.path pools/mine --output pools/mine.html
  mmemb rationales show     --config recipes/r1.yaml --model.pool.path pools/mine --limit 5 --task flagattr
  mmemb fit                 --config recipes/r1.yaml --model.pool.path pools/mine

`mmemb fit` does the first two by itself if the config names workers and the pool is missing. Start generate or score
again to continue it after a stop. Every other option is a setting of `mmemb fit` (`mmemb fit --help`).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` lists the options)")


def main(argv: Sequence[str]) -> int:
    """Runs one of the four actions."""
    parser = _Parser(
        prog="mmemb rationales",
        description="Generates, scores, counts or shows the rationale candidates that a config trains on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("generate", "score", "stats", "show"), help="what to do with the pool")
    parser.add_argument(
        "--config", "-c", action="append", metavar="FILE", help="a config of mmemb fit; may be repeated"
    )
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="show: pairs printed per task (default: 3)")
    parser.add_argument("--task", help="show, stats: use the pairs of this task only")
    parser.add_argument("--pair", metavar="ID", help="show: print this pair only")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="rationales.html",
        help="stats: the report to write (default: rationales.html)",
    )
    options, rest = parser.parse_known_args(argv[1:])
    if not options.config:
        raise UsageError(f"rationales {options.action}: give the training settings with --config, e.g. recipes/r1.yaml")
    configs = [word for path in options.config for word in ("--config", path)]
    from mmemb.commands.parsing.lightning_cli import build

    model, datamodule, accelerator = build(["fit", *configs, *rest])
    if model.pool is None:
        raise UsageError("the config has no model.pool; set model.pool.path and model.pool.workers")
    datamodule.setup("fit")
    pairs = list(model.rationale_pairs(datamodule))
    tasks = sorted({pair.task for pair in pairs})
    if options.task is not None and options.task not in tasks:
        raise UsageError(f"--task {options.task}: the data has the tasks {', '.join(tasks)}")
    if options.action == "show":
        _show(model, pairs, limit=options.limit, tasks=[options.task] if options.task else tasks, pair_id=options.pair)
    elif options.action == "stats":
        _stats(model, pairs, task=options.task, output=options.output)
    else:
        _make(options.action, model, pairs, device=_device(accelerator))
    return 0


def _device(accelerator: Any) -> str:
    """The device on which `mmemb fit` would make the pool: the GPU if there is one and the settings allow it."""
    import torch

    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def _make(action: str, model: Any, pairs: Sequence[Any], *, device: str) -> None:
    """Writes the candidates, or their scores."""
    from mmemb.rationales.generate import generate
    from mmemb.rationales.score import score

    settings, parts = model.pool, model.model
    if action == "generate":
        if not settings.workers:
            raise UsageError("model.pool.workers is empty; name the workers of the candidates, e.g. [metadata, model]")
        model.to(device)
        generate(
            pairs,
            settings.workers,
            settings.candidates,
            pool=settings.path,
            seed=settings.seed,
            model=parts,
            leaks=settings.leaks,
            shard_size=settings.shard_size,
        )
        return
    if settings.evaluator is None:
        raise UsageError("model.pool.evaluator is missing; name what scores the candidates, e.g. retrieval")
    model.to(device)
    score(pairs, settings.evaluator, settings.path, model=parts)


def _open(settings: Any, pairs: Sequence[Any]) -> Any:
    """Opens the pool of these pairs with its leaks and, if it has been scored, the named evaluator's scores."""
    from mmemb.rationales.pool import RationalePool
    from mmemb.rationales.score import evaluator_name
    from mmemb.rationales.storage import read_manifest

    name = None if settings.evaluator is None else evaluator_name(settings.evaluator)
    known = read_manifest(settings.path).evaluators
    # If only another evaluator has scored the pool, opening it raises an error.
    pool = RationalePool.open(settings.path, evaluator=name if known else None, keep_leaks=True)
    pool.check(pairs)
    return pool


def _stats(model: Any, pairs: Sequence[Any], *, task: str | None, output: str) -> None:
    """Prints the statistics by task and worker, and writes the report."""
    from rich.table import Table
    from rich.text import Text

    from mmemb.rationales.page import COLUMNS, LEGEND, cells, write_page
    from mmemb.rationales.stats import ALL, pool_stats

    pool = _open(model.pool, pairs)
    pairs = [pair for pair in pairs if task in (None, pair.task)]
    # The margin of the selector. A selector without a margin keeps every candidate that helps.
    margin = float(getattr(model.selector, "margin", 0.0))
    net = bool(getattr(model.selector, "net_of_placebo", False))
    with terminal.progress("read rationales", len(pairs), unit="pairs") as bar:
        groups = pool_stats(pool, pairs, margin=margin, net_of_placebo=net, advance=bar.advance)
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for group in groups:
        table.add_row(*map(Text, cells(group)), style="bold" if group.task == ALL else "")
    console = terminal.table_console()
    console.print(table)
    console.print(LEGEND, style="dim", soft_wrap=True)
    facts = {
        "pool": str(model.pool.path),
        "content hash": pool.manifest.hash,
        "scored by": pool.evaluator or "no evaluator yet",
        "kept": f"{'net ' if net else ''}gain above {margin:g} nats",
        "pairs": str(len(pairs)),
    }
    terminal.say(f"report: {write_page(output, groups, facts, margin=margin)}")


def _show(model: Any, pairs: Sequence[Any], *, limit: int, tasks: Sequence[str], pair_id: str | None) -> None:
    """Prints pairs with their candidates, gains and the selector's choice."""
    from mmemb.rationales.choose import show

    pool = _open(model.pool, pairs)
    if pair_id is not None:
        chosen = [pair for pair in pairs if pair.id == pair_id]
        if not chosen:
            raise UsageError(f"--pair {pair_id}: none of the {len(pairs)} pairs has this id; one id is {pairs[0].id}")
    else:
        chosen = []
        for name in tasks:
            of_task = (pair for pair in pairs if pair.task == name and pair.id in pool)
            chosen += islice(of_task, max(0, limit))  # looking up a pair reads the pool, so only as many as are shown
    without_choice: list[str] = []
    for pair in chosen:
        try:
            show(pair, pool, model.selector)
        except ValueError as error:  # the selector needs scores, and this pair has none (yet)
            show(pair, pool)
            without_choice.append(str(error))
    if without_choice:
        terminal.say(f"no choice is shown for {len(without_choice)} of {len(chosen)} pairs: {without_choice[0]}")
