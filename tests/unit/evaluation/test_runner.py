"""The runner with an encoder made of tables, so that every number can be computed by hand."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.evaluation.runner import calibrate, evaluate, merge_results, mode_scores
from mmemb.inference.adaptive import AdaptivePaths, confidence_over
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Controller, SetupContext, Worker
from mmemb.registry import create
from mmemb.types import Decision, EvaluationResults, EvaluationTask, Item, Pair, PrefillState, Rationale, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakePooler

# Candidate i is the i-th unit vector. The text of a query has four words: the candidate that its direct path finds, the
# candidate of its reasoned path, that of the true rationale, and the number of rationale tokens.
WIDTH = 4


def unit(column: str) -> Tensor:
    """A unit vector; ``x`` has the same cosine with every candidate."""
    return torch.ones(WIDTH) / WIDTH**0.5 if column == "x" else torch.eye(WIDTH)[int(column)]


class Tables:
    """An encoder without a model, which records its calls."""

    confidence_temperature = 0.5

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def encode_targets(self, items: Sequence[Item]) -> Tensor:
        self.asked.append(("targets", len(items)))
        return torch.stack([unit(item.text) for item in items]) if items else torch.zeros(0, WIDTH)

    def encode_queries(self, items: Sequence[Item], rationales: Sequence[str | None] | None = None) -> Tensor:
        self.asked.append(("queries", len(items)))
        texts = [None] * len(items) if rationales is None else rationales
        rows = [unit(item.text.split()[2 if text else 0]) for item, text in zip(items, texts, strict=True)]
        return torch.stack(rows) if rows else torch.zeros(0, WIDTH)

    def encode_paths(
        self, items: Sequence[Item], controller: Controller | None = None, *, bank: Tensor | None = None
    ) -> AdaptivePaths:
        words = [item.text.split() for item in items]
        direct = torch.stack([unit(word[0]) for word in words]) if words else torch.zeros(0, WIDTH)
        confidence = None if bank is None else confidence_over(direct, bank, temperature=0.5)
        state = PrefillState(torch.zeros(len(items), 2), direct, confidence)
        decision = (controller or AlwaysReason(48)).decide(state)
        think = decision.think
        self.asked += [("prefill", len(items)), ("think", int(think.sum()))]
        written = torch.tensor([int(word[3]) for word in words], dtype=torch.int64)
        written = torch.minimum(written, decision.budget)
        # A rationale that was cut finds nothing: its embedding ties all candidates.
        whole = [int(word[3]) <= budget for word, budget in zip(words, decision.budget.tolist(), strict=True)]
        reasoned = [unit(word[1] if complete else "x") for word, complete in zip(words, whole, strict=True)]
        embedding = torch.where(think[:, None], torch.stack(reasoned), direct) if words else direct
        return AdaptivePaths(
            state,
            decision,
            embedding,
            ["a thought" if yes else "" for yes in think],
            [()] * len(items),
            torch.where(think, written + 2, 0),
            torch.zeros(len(items), dtype=torch.bool),
            direct_seconds=1.0,
            think_seconds=4.0,
        )

    def count_tokens(self, text: str) -> int:
        return len(text.split())


class TrueRationale(Worker):
    """Has a rationale for every query that does not start with 3."""

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        return [[] if item.text.startswith("3") else [Rationale("three words here")] for item in items]

    @property
    def settings(self) -> dict[str, Any]:
        return {}


def task(name: str, *queries: tuple[str, int]) -> EvaluationTask:
    pairs = [
        Pair(f"{name}/{row}", name, Item("find", (Text(text),)), Item("", (Text(str(positive)),)), f"id{positive}")
        for row, (text, positive) in enumerate(queries)
    ]
    candidates = [Item("", (Text(str(column)),)) for column in range(WIDTH)]
    return EvaluationTask(name, pairs, candidates, [f"id{column}" for column in range(WIDTH)])


# The direct path finds the target | reasoning helps | reasoning hurts | there is no true rationale
A = task("a", ("0 0 0 5", 0), ("1 2 2 7", 2), ("1 0 1 3", 1), ("3 3 3 1", 3))
B = task("b", ("x 1 1 9", 1), ("x 2 2 9", 1))


def run(*names: str, worker: Worker | None = None, tasks: Sequence[EvaluationTask] = (A, B)) -> EvaluationResults:
    controllers = {name: create("controller", name) for name in names}
    return evaluate(Tables(), list(tasks), controllers=controllers, true_rationale=worker, progress=False)


def test_scores_equal_those_computed_by_hand() -> None:
    results = run("never", "always_reason", "oracle", worker=TrueRationale())
    never, always = results.modes["never"]["by_task"], results.modes["always_reason"]["by_task"]
    assert never["a"]["hit@1"] == pytest.approx(3 / 4)
    assert always["a"]["hit@1"] == pytest.approx(3 / 4)
    assert never["b"]["hit@1"] == pytest.approx(1 / 4)  # the query ties with all candidates, which gives chance
    assert always["b"]["hit@1"] == pytest.approx(1 / 2)
    # The positive that is not found ties with two other candidates, so its rank is 2, 3 or 4.
    assert never["a"]["mrr"] == pytest.approx((3 + (1 / 2 + 1 / 3 + 1 / 4) / 3) / 4)
    assert never["a"]["hit@5"] == 1.0
    assert (never["a"]["n"], never["a"]["candidates"], never["a"]["chance"]) == (4, 4, 0.25)
    assert (never["a"]["invocation_rate"], never["a"]["tokens_per_query"]) == (0.0, 0.0)
    assert (always["a"]["invocation_rate"], always["a"]["tokens_per_query"]) == (1.0, (5 + 7 + 3 + 1) / 4 + 2)
    oracle = results.modes["oracle"]["by_task"]
    assert oracle["a"]["hit@1"] == 1.0
    assert oracle["a"]["invocation_rate"] == 1 / 4
    assert oracle["a"]["tokens_per_query"] == 9 / 4
    true = results.modes["true_rationale"]["by_task"]
    assert true["a"]["hit@1"] == 1.0
    assert (true["a"]["invocation_rate"], true["a"]["tokens_per_query"]) == (3 / 4, 3 * 5 / 4)


def test_a_row_counts_every_task_once() -> None:
    results = run("never", "always_reason")
    assert results.modes["never"]["hit@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert results.modes["always_reason"]["tokens_per_query"] == pytest.approx((6 + 11) / 2)
    assert set(results.modes["never"]["by_task"]) == {"a", "b"}


def test_every_controller_uses_the_same_single_pass() -> None:
    encoder = Tables()
    controllers = {name: create("controller", name) for name in ("never", "always_reason", "random", "oracle", "rl")}
    evaluate(encoder, [A], controllers=controllers, true_rationale=None, progress=False)
    assert encoder.asked == [("targets", 4), ("prefill", 4), ("think", 4)]


def test_no_query_reasons_if_no_controller_wants_it() -> None:
    encoder = Tables()
    results = evaluate(
        encoder, [A], controllers={"never": create("controller", "never")}, true_rationale=None, progress=False
    )
    assert ("think", 0) in encoder.asked
    assert all(record.reasoned_rank is None and record.rationale == "" for record in results.records)


def test_speed_counts_all_of_the_prompt_time_and_decoding_time_by_tokens() -> None:
    modes = run("never", "always_reason", "oracle", tasks=[A]).modes
    assert modes["never"]["queries_per_second"] == pytest.approx(4 / 1)
    assert modes["always_reason"]["queries_per_second"] == pytest.approx(4 / 5)
    assert modes["oracle"]["queries_per_second"] == pytest.approx(4 / (1 + 4 * 9 / 24))


def test_a_smaller_budget_encodes_only_the_queries_that_it_cuts() -> None:
    encoder = Tables()
    controllers = {
        "full": create("controller", "always_reason"),
        "short": create("controller", "always_reason", budget=3),
    }
    results = evaluate(encoder, [A], controllers=controllers, true_rationale=None, progress=False)
    # Rationales of 5 and 7 tokens exceed the budget; those of 3 and 1 tokens are reused.
    assert encoder.asked[-2:] == [("prefill", 2), ("think", 2)]
    short = results.modes["short"]["by_task"]["a"]
    assert short["tokens_per_query"] == (5 + 5 + 5 + 3) / 4
    assert short["hit@1"] == pytest.approx((1 / 4 + 1 / 4 + 0 + 1) / 4)


def test_a_controller_without_a_budget_has_the_budget_of_the_encoder() -> None:
    modes = run("always_reason", "oracle", tasks=[task("long", ("0 1 1 60", 1))]).modes
    assert modes["always_reason"]["tokens_per_query"] == modes["oracle"]["tokens_per_query"] == 62


def test_records_contain_the_outcome_of_each_path() -> None:
    records = run("always_reason").records
    helped = records[1]
    assert (helped.task, helped.pair.id) == ("a", "a/1")
    assert (helped.direct_hit, helped.reasoned_hit) == (0.0, 1.0)
    assert (helped.direct_rank, helped.reasoned_rank) == (3.0, 1.0)
    assert helped.direct_top[0] == "id1"
    assert helped.reasoned_top is not None
    assert helped.reasoned_top[0] == "id2"
    assert len(helped.direct_top) == 3
    assert (helped.rationale, helped.tokens) == ("a thought", 9)
    # One candidate at cosine 1, three at 0, temperature 1/2.
    chosen, others = math.e**2 / (math.e**2 + 3), 1 / (math.e**2 + 3)
    assert helped.confidence == pytest.approx(chosen)
    assert helped.utility == pytest.approx(math.log(chosen / others))
    assert records[0].utility == pytest.approx(0)
    assert records[2].utility == pytest.approx(-math.log(chosen / others))


def test_calibration_fits_on_all_validation_queries() -> None:
    controller = create("controller", "threshold")
    calibrate(Tables(), [A, B], {"threshold": controller, "never": create("controller", "never")})
    # The confidence is 1/4 on task b, where reasoning pays, and .71 on task a, where it gains nothing.
    assert 0.25 < controller.threshold < 0.72
    results = evaluate(Tables(), [A, B], controllers={"threshold": controller}, true_rationale=None, progress=False)
    by_task = results.modes["threshold"]["by_task"]
    assert (by_task["a"]["invocation_rate"], by_task["b"]["invocation_rate"]) == (0.0, 1.0)


def test_calibration_encodes_nothing_if_no_controller_is_fitted() -> None:
    encoder = Tables()
    calibrate(encoder, [A], {"never": create("controller", "never")})
    assert encoder.asked == []


def test_merging_parts_equals_evaluating_together() -> None:
    together = run("never", "always_reason")
    parts = [run("never", "always_reason", tasks=[each]) for each in (A, B)]
    merged = merge_results(parts)
    assert merged.modes == together.modes
    assert [record.pair.id for record in merged.records] == [record.pair.id for record in together.records]
    assert list(merged.tasks) == ["a", "b"]


def test_a_mean_needs_the_score_of_every_task() -> None:
    scores = mode_scores({"a": {"hit@1": 0.5, "mrr": 0.5}, "b": {"hit@1": 1.0}})
    assert scores["hit@1"] == 0.75
    assert "mrr" not in scores
    assert mode_scores({}) == {"by_task": {}}


def test_errors_name_the_task_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match=r"task a: the positive 'id9' of query 'a/0' is not a candidate"):
        run("never", tasks=[task("a", ("0 0 0 5", 9))])
    with pytest.raises(ValueError, match="task empty: the task has no queries"):
        run("never", tasks=[task("empty")])


def fake_tasks() -> list[EvaluationTask]:
    texts = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(9)]
    pairs = [
        Pair(f"q{i}", "words", Item("what is", (Text(text),)), Item("", (Text(WORDS[i]),)), WORDS[i])
        for i, text in enumerate(texts)
    ]
    return [EvaluationTask("words", pairs, [Item("", (Text(word),)) for word in WORDS[:9]], WORDS[:9])]


def fake_encoder() -> Encoder:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    return Encoder(FakeBackbone(), pooler, batch_size=4, budget=8)


def test_a_shared_pass_equals_one_pass_per_controller() -> None:
    encoder, tasks = fake_encoder(), fake_tasks()
    results = evaluate(
        encoder,
        tasks,
        controllers={name: create("controller", name) for name in ("never", "always_reason", "rl", "random")},
        true_rationale=None,
        progress=True,
    )
    bank = encoder.encode_targets(tasks[0].candidates)
    for name, scores in results.modes.items():
        alone = encoder.encode([pair.query for pair in tasks[0].queries], create("controller", name), bank=bank)
        cosines = normalize(alone.embedding, dim=-1) @ bank.T
        hits = (cosines.argmax(1) == torch.arange(9)).float().mean().item()
        assert scores["hit@1"] == pytest.approx(hits)
        assert scores["tokens_per_query"] == pytest.approx(alone.tokens.float().mean().item())


def _rank_main(rank: int, port: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = _scored()
    torch.distributed.destroy_process_group()
    torch.save(results, Path(out) / str(rank))


def _scored() -> dict[str, Any]:
    controllers = {name: create("controller", name) for name in ("never", "always_reason", "threshold", "oracle")}
    encoder, tasks = fake_encoder(), fake_tasks()
    calibrate(encoder, tasks, controllers)
    results = evaluate(encoder, tasks, controllers=controllers, true_rationale=TrueRationale(), progress=False)
    for scores in results.modes.values():
        for each in (scores, scores["by_task"]["words"]):
            each.pop("queries_per_second")
    return results.modes


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank_main, args=(port, str(tmp_path)), nprocs=2)
    alone = _scored()
    for rank in range(2):
        assert torch.load(tmp_path / str(rank), weights_only=True) == alone


class Bound(Controller):
    """Every query reasons, each with its own budget."""

    def decide(self, state: PrefillState) -> Decision:
        rows = len(state.direct)
        return Decision(torch.ones(rows, dtype=torch.bool), torch.ones(rows), torch.arange(rows) + 1)


def test_each_query_keeps_its_own_budget() -> None:
    results = evaluate(
        Tables(),
        [A],
        controllers={"rows": Bound(), "all": create("controller", "always_reason")},
        true_rationale=None,
        progress=False,
    )
    # Budgets of 1, 2, 3, 4 tokens for rationales of 5, 7, 3, 1 tokens.
    assert results.modes["rows"]["by_task"]["a"]["tokens_per_query"] == (1 + 2 + 3 + 1) / 4 + 2
