"""`mmemb rationales generate | score | show`: the rationale pool of a training config, apart from the training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mmemb.commands.errors import UsageError

_EPILOG = """The data, the backbone, the workers, the evaluator and the pool's place are those of the training config:

  mmemb rationales generate --config recipes/r1.yaml --model.pool.path pools/mine --model.pool.workers [metadata,model]
  mmemb rationales score    --config recipes/r1.yaml --model.pool.path pools/mine --model.pool.evaluator retrieval
  mmemb rationales show     --config recipes/r1.yaml --model.pool.path pools/mine --limit 5 --task flagattr
  mmemb fit                 --config recipes/r1.yaml --model.pool.path pools/mine

`mmemb fit` does the first two by itself where the config names workers and the pool is missing. A stopped generate or
score goes on where it was. Every other option is a setting of `mmemb fit` (`mmemb fit --help`).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` lists the options)")


def main(argv: Sequence[str]) -> int:
    """Runs one of the three."""
    parser = _Parser(
        prog="mmemb rationales",
        description="Makes, scores or shows the rationale candidates that a config trains on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("generate", "score", "show"), help="what to do with the pool")
    parser.add_argument(
        "--config", "-c", action="append", metavar="FILE", help="a config of mmemb fit; may be repeated"
    )
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="show: pairs printed a task (default: 3)")
    parser.add_argument("--task", help="show: pairs of this task only")
    parser.add_argument("--pair", metavar="ID", help="show: this pair only")
    options, rest = parser.parse_known_args(argv[1:])
    if not options.config:
        raise UsageError(f"rationales {options.action}: give the training settings by --config, e.g. recipes/r1.yaml")
    configs = [word for path in options.config for word in ("--config", path)]
    from mmemb.cli import build

    model, datamodule = build(["fit", *configs, *rest])
    if model.pool is None:
        raise UsageError("the config has no model.pool: say there where the candidates are kept and who writes them")
    datamodule.setup("fit")
    pairs = list(datamodule.train_pairs)
    if options.action == "show":
        _show(model, pairs, limit=options.limit, task=options.task, pair_id=options.pair)
    else:
        _make(options.action, model, pairs)
    return 0


def _make(action: str, model: Any, pairs: Sequence[Any]) -> None:
    """Writes candidates, or their scores."""
    from mmemb.stages.generate import generate
    from mmemb.stages.select import score

    settings, parts = model.pool, model.parts
    if action == "generate":
        if not settings.workers:
            raise UsageError("model.pool.workers is empty: name who writes the candidates, e.g. [metadata, model]")
        settings.bind(parts)
        generate(
            pairs,
            settings.workers,
            settings.candidates,
            pool=settings.path,
            seed=settings.seed,
            leaks=settings.leaks,
        )
        return
    if settings.evaluator is None:
        raise UsageError("model.pool.evaluator is missing: name who scores the candidates, e.g. retrieval")
    settings.bind(parts)
    score(pairs, settings.evaluator, settings.path)


def _show(model: Any, pairs: Sequence[Any], *, limit: int, task: str | None, pair_id: str | None) -> None:
    """Prints pairs with their candidates, gains and the selector's choice."""
    from mmemb.data.pool import RationalePool
    from mmemb.stages.select import show

    pool = RationalePool.open(model.pool.path)
    tasks = sorted({pair.task for pair in pairs})
    if task is not None and task not in tasks:
        raise UsageError(f"--task {task}: the data has the tasks {', '.join(tasks)}")
    if pair_id is not None:
        chosen = [pair for pair in pairs if pair.id == pair_id]
        if not chosen:
            raise UsageError(f"--pair {pair_id}: there is no such pair among {len(pairs)}; e.g. {pairs[0].id}")
    else:
        chosen = []
        for name in tasks if task is None else [task]:
            chosen += [pair for pair in pairs if pair.task == name and pair.id in pool][:limit]
    scored = pool.evaluator is not None
    for pair in chosen:
        show(pair, pool, model.selector if scored else None)
