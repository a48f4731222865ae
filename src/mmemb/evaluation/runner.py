"""Scores an encoder on retrieval tasks with every controller, in a single pass over the queries.

The direct and the reasoned embedding of a query do not depend on the controller. So one adaptive pass computes the
direct path of all queries, and the reasoned path of the queries for which any controller asks. Each controller then
only picks one of the two per query. A query is encoded again only if a controller's budget is smaller than the
rationale already written.

The utility of reasoning is s_r - s_d, where s is the log-probability of the positive among the task's own candidates
at the encoder's confidence temperature. Measured: hard candidates of the task predict the rank of the positive, cosines
against easy negatives do not.

Under `torch.distributed` each rank encodes every world-size-th query and candidate, and all ranks return the same
results. Every rank must therefore call with the same tasks.

Shape legend: N queries, M candidates, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from mmemb.common import terminal
from mmemb.common.vocabulary import ALWAYS_REASON, TRUE_RATIONALE
from mmemb.evaluation.metrics import ExpectedHitRate, ExpectedReciprocalRank
from mmemb.evaluation.ranking import Ranking
from mmemb.evaluation.ranks import gather, in_order, sharded, share, world
from mmemb.inference.adaptive import AdaptivePaths
from mmemb.inference.encoder import merge_paths
from mmemb.interfaces import Controller, Worker
from mmemb.registry import create
from mmemb.types import Decision, EvaluationResults, EvaluationTask, Item, PrefillState, QueryRecord

MEANS = ("hit@1", "hit@5", "mrr", "invocation_rate", "tokens_per_query", "chance", "queries_per_second")
"""Scores of a task that a row averages over its tasks, where each task counts once."""


class QueryEncoder(Protocol):
    """The part of `mmemb.inference.encoder.Encoder` that the runner needs."""

    confidence_temperature: float

    def encode_queries(self, items: Sequence[Item], rationales: Sequence[str | None] | None = None) -> Tensor: ...
    def encode_targets(self, items: Sequence[Item]) -> Tensor: ...
    def encode_paths(
        self, items: Sequence[Item], controller: Controller | None = None, *, bank: Tensor | None = None
    ) -> AdaptivePaths: ...
    def count_tokens(self, text: str) -> int: ...


def merge_results(parts: Iterable[EvaluationResults]) -> EvaluationResults:
    """Joins results of different tasks and computes the means over all of them."""
    merged = EvaluationResults()
    by_task: dict[str, dict[str, dict[str, float]]] = {}
    for part in parts:
        for mode, scores in part.modes.items():
            by_task.setdefault(mode, {}).update(scores["by_task"])
        merged.records += part.records
        merged.tasks |= part.tasks
    merged.modes = {mode: mode_scores(tasks) for mode, tasks in by_task.items()}
    return merged


def mode_scores(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A row's entry in the results: the mean of every score that all tasks have, and the scores by task."""
    tasks = {task: dict(scores) for task, scores in by_task.items()}
    means = {
        key: sum(scores[key] for scores in tasks.values()) / len(tasks)
        for key in MEANS
        if tasks and all(key in scores for scores in tasks.values())
    }
    return {**means, "by_task": tasks}


def evaluate(
    encoder: QueryEncoder,
    tasks: Sequence[EvaluationTask],
    *,
    controllers: Mapping[str, Controller],
    true_rationale: Worker | None,
    progress: bool = True,
) -> EvaluationResults:
    """Scores every controller on every task, and the reasoned path with the true rationale.

    The scores of a task are those of `mmemb.common.vocabulary`, and ``chance``, the hit@1 of a random order. hit@1,
    hit@5 and mrr are expected values over the orders of ties. ``tokens_per_query`` counts ``<think>`` and ``</think>``.
    ``queries_per_second`` is an estimate from the single pass. It charges the whole time of the prompts, and the share
    of the decoding time that equals the controller's share of the tokens.

    Args:
        encoder: the model.
        tasks: retrieval tasks; every positive is among its task's candidates.
        controllers: row -> controller. Controllers that need calibration are calibrated.
        true_rationale: worker whose first rationale the model reads in the row ``true_rationale``; None leaves the row
            out.
        progress: whether to report progress over queries, task by task.

    Raises:
        ValueError: a task has no queries, or a positive is not among its candidates.
    """
    parts = []
    for task in _reported("evaluate", tasks, show=progress):
        parts.append(_evaluate_task(encoder, task, controllers, true_rationale))
    return merge_results(parts)


def _reported(title: str, tasks: Sequence[EvaluationTask], *, show: bool) -> Iterator[EvaluationTask]:
    """The tasks in turn; reports which one is at work, and how many queries of how many are done."""
    with terminal.progress(title, sum(len(task.queries) for task in tasks), unit="queries", show=show) as bar:
        for task in tasks:
            bar.about(f"{title} {task.name}")
            yield task
            bar.advance(len(task.queries))
        bar.about(title)


def calibrate(
    encoder: QueryEncoder,
    tasks: Sequence[EvaluationTask],
    controllers: Mapping[str, Controller],
    *,
    progress: bool = True,
) -> None:
    """Fits every controller that has something to fit on the queries of all tasks, in place. Each task counts once.

    Args:
        encoder: the model.
        tasks: validation tasks.
        controllers: controllers by row. Those without a ``calibrate`` method of their own stay as they are.
        progress: whether to report progress over queries, task by task.
    """
    fitted = [part for part in controllers.values() if type(part).calibrate is not Controller.calibrate]
    if not fitted:
        return
    reported = _reported("calibrate", tasks, show=progress)
    states = [_Run.of(encoder, task, {ALWAYS_REASON: None}).state for task in reported]
    for state in states:
        state.weight = torch.full((len(state.direct),), 1 / len(state.direct))  # every task counts once
    joined = {each.name: torch.cat([getattr(state, each.name) for state in states]) for each in fields(PrefillState)}
    whole = PrefillState(**joined)
    for controller in fitted:
        controller.calibrate(whole)


class _Any(Controller):
    """Reasons where any of several controllers does, with the largest of their budgets.

    If one of them needs the utility, every query reasons.
    """

    def __init__(self, controllers: Sequence[Controller]) -> None:
        self.controllers = controllers

    def decide(self, state: PrefillState) -> Decision:
        """The union of the decisions."""
        rows, device = len(state.direct), state.direct.device
        budget = torch.zeros(rows, dtype=torch.int64, device=device)
        for controller in self.controllers:
            if controller.needs_utility:
                asked = torch.full_like(budget, controller.limit)
            else:
                decision = controller.decide(state)
                asked = torch.where(decision.think, decision.budget, 0)
            budget = torch.maximum(budget, asked)
        return Decision(budget > 0, (budget > 0).float(), budget)


@dataclass
class _Run:
    """One encoded task, from which every row picks. ``paths`` covers all N queries, whichever rank encoded them."""

    task: EvaluationTask
    ranking: Ranking
    paths: AdaptivePaths
    state: PrefillState

    @classmethod
    def of(cls, encoder: QueryEncoder, task: EvaluationTask, controllers: Mapping[str, Controller | None]) -> _Run:
        """Encodes candidates and queries. If a controller is None, every query reasons."""
        ranking = Ranking.of(task, sharded(task.candidates, encoder.encode_targets))
        mine = share(len(task.queries))
        asked = [part for part in controllers.values() if part is not None]
        union = _Any(asked) if len(asked) == len(controllers) else None
        own = encoder.encode_paths([task.queries[row].query for row in mine], union, bank=ranking.candidates)
        shares = gather((mine, own))
        order = [row for rows, _ in shares for row in rows]
        paths = merge_paths(order, [part for rows, part in shares if rows], width=ranking.candidates.shape[1])
        direct = paths.state.direct
        temperature = encoder.confidence_temperature
        known = bool(paths.decision.think.all())
        utility = ranking.log_probability(paths.embedding, temperature=temperature)
        utility = utility - ranking.log_probability(direct, temperature=temperature)
        state = PrefillState(
            decision_logits=paths.state.decision_logits,
            direct=direct,
            confidence=ranking.confidence(direct, temperature=temperature),
            utility=utility if known else None,
            hit_gain=ranking.hits(paths.embedding) - ranking.hits(direct) if known else None,
            tokens=paths.tokens if known else None,
        )
        return cls(task, ranking, paths, state)


def _evaluate_task(
    encoder: QueryEncoder, task: EvaluationTask, controllers: Mapping[str, Controller], true_rationale: Worker | None
) -> EvaluationResults:
    run = _Run.of(encoder, task, controllers)
    modes = {name: _controller_scores(encoder, run, controller) for name, controller in controllers.items()}
    if true_rationale is not None:
        modes[TRUE_RATIONALE] = _true_rationale_scores(encoder, run, true_rationale)
    return EvaluationResults(
        modes={mode: mode_scores({task.name: scores}) for mode, scores in modes.items()},
        records=_records(run),
        tasks={task.name: task},
    )


def _controller_scores(encoder: QueryEncoder, run: _Run, controller: Controller) -> dict[str, float]:
    """Picks a path per query as the controller decides; encodes a query again only if its rationale is over budget."""
    decision = controller.decide(run.state)
    think = decision.think
    embedding = torch.where(think[:, None], run.paths.embedding, run.state.direct)
    tokens = torch.where(think, run.paths.tokens, 0)
    portion = float(tokens.sum() / run.paths.tokens.sum().clamp(min=1))
    seconds = run.paths.direct_seconds + portion * run.paths.think_seconds
    # <think> and </think> count as tokens, but not towards the budget.
    over = think & (~run.paths.decision.think | (run.paths.tokens - 2 > decision.budget))
    for budget in decision.budget[over].unique().tolist():
        rows = (over & (decision.budget == budget)).nonzero().flatten()
        queries = [run.task.queries[row].query for row in rows.tolist()]
        again = encoder.encode_paths(
            queries, create("controller", "always_reason", budget=budget), bank=run.ranking.candidates
        )
        embedding[rows], tokens[rows] = again.embedding, again.tokens
        seconds += again.think_seconds
    return _scores(run, embedding, tokens, think, seconds)


def _true_rationale_scores(encoder: QueryEncoder, run: _Run, worker: Worker) -> dict[str, float]:
    items = [pair.query for pair in run.task.queries]
    texts = [found[0].text if found else None for found in worker.propose(items, 1, seed=0)]
    started = time.perf_counter()
    mine = share(len(items))
    own = encoder.encode_queries([items[row] for row in mine], [texts[row] for row in mine])
    embedding = in_order(mine, own)
    tokens = torch.tensor([0 if text is None else encoder.count_tokens(text) + 2 for text in texts])
    seconds = (time.perf_counter() - started) * world()
    return _scores(run, embedding, tokens, tokens > 0, seconds)


def _scores(run: _Run, embedding: Tensor, tokens: Tensor, think: Tensor, seconds: float) -> dict[str, float]:
    n, counts = len(embedding), run.ranking.counts
    # Every rank holds all rows here, so the metrics need no sum over ranks.
    metrics = {
        "hit@1": ExpectedHitRate(1, sync_on_compute=False),
        "hit@5": ExpectedHitRate(5, sync_on_compute=False),
        "mrr": ExpectedReciprocalRank(sync_on_compute=False),
    }
    for rows in run.ranking.parts():
        scores, positive = run.ranking.scores(embedding, rows), run.ranking.positive[rows]
        for metric in metrics.values():
            metric.update(scores, positive)
    return {
        **{name: float(metric.compute()) for name, metric in metrics.items()},
        "n": n,
        "candidates": round(float(counts.double().mean())),
        "invocation_rate": float(think.float().mean()),
        "tokens_per_query": float(tokens.float().mean()),
        "chance": float((1 / counts.double()).mean()),
        "queries_per_second": n / max(seconds, 1e-9),
    }


def _records(run: _Run) -> list[QueryRecord]:
    known = run.paths.decision.think.tolist()
    direct = _placed(run, run.state.direct)
    reasoned = _placed(run, run.paths.embedding)
    utility = run.state.utility
    confidence = run.state.confidence
    margin = run.state.margin
    records = []
    for row, pair in enumerate(run.task.queries):
        record = QueryRecord(
            task=run.task.name,
            pair=pair,
            confidence=float("nan") if confidence is None else confidence[row].item(),
            direct_rank=direct[row][0],
            direct_hit=direct[row][1],
            direct_top=direct[row][2],
            margin=margin[row].item(),
        )
        if known[row]:
            record.reasoned_rank, record.reasoned_hit, record.reasoned_top = reasoned[row]
            record.utility = None if utility is None else utility[row].item()
            record.rationale, record.tokens = run.paths.rationale[row], int(run.paths.tokens[row])
        records.append(record)
    return records


def _placed(run: _Run, embedding: Tensor) -> list[tuple[float, float, tuple[str, ...]]]:
    """Expected rank, expected hit@1 and the first candidate ids of every query."""
    return [
        (rank, hit, tuple(run.task.candidate_ids[column] for column in columns))
        for rank, hit, columns in run.ranking.placed(embedding)
    ]
