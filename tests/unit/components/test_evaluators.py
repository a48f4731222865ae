"""Tests that evaluators compute their formulas in any batch, and encode a prompt once for all its arms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.components.evaluators.judge import JudgeEvaluator
from mmemb.components.evaluators.plausible import PlausibleEvaluator
from mmemb.components.evaluators.retrieval import RetrievalEvaluator
from mmemb.data.bundled import load_pairs
from mmemb.data.items import content_identity
from mmemb.inference import embedder
from mmemb.inference.embedder import Embedder
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Evaluator, Model, SetupContext
from mmemb.registry import available, create
from mmemb.types import Image, Item, Pair, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakePooler


def make_pairs(count: int, *, tasks: int = 2) -> list[Pair]:
    """Pairs whose targets repeat: three pairs in a row share one."""
    return [
        Pair(
            id=f"p{number}",
            task=f"task-{number % tasks}",
            query=Item("what is", (Text(" ".join(WORDS[number % 7 : number % 7 + 3])),)),
            positive=Item("", (Text(" ".join(WORDS[number // 3 % 12 : number // 3 % 12 + 2])),)),
            positive_id=f"t{number // 3 % 12}",
        )
        for number in range(count)
    ]


def model() -> tuple[FakeBackbone, FakePooler]:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    return FakeBackbone(seed=1), pooler


def bound(**options: Any) -> RetrievalEvaluator:
    evaluator = RetrievalEvaluator(**options)
    evaluator.setup(SetupContext(model=Model(*model())))
    return evaluator


def test_the_drawn_negatives_do_not_depend_on_the_disk() -> None:
    def bank(disk: str) -> list[str]:
        targets = [Item("", (Image(f"{disk}/photos/{number}.png"),)) for number in range(40)]
        pairs = [
            Pair(f"p{number}", "t", targets[number], targets[number], content_identity(targets[number]))
            for number in range(40)
        ]
        evaluator = bound(negatives=5)
        evaluator.setup(SetupContext(pairs=pairs))
        return [Path(target).name for target in evaluator._bank["t"]]

    assert bank("/disk/a") == bank("/mnt/b")


ARGUMENTS = {"judge": {"yes": "left", "no": "right", "answer": "what is", "reasoning": "red {rationale} blue"}}
"""Arguments with which an evaluator works with the fake model, whose vocabulary has a dozen words."""

RATIONALES = ("chile peso", None, "peru lima sol", "red")


@pytest.fixture(params=available("evaluator"))
def evaluator(request: pytest.FixtureRequest) -> Evaluator:
    checked = {"evaluator": RetrievalEvaluator()} if request.param == "plausible" else {}
    made = create("evaluator", request.param, **checked, **ARGUMENTS.get(request.param, {}))
    assert isinstance(made, Evaluator)
    made.setup(SetupContext(model=Model(*model())))
    return made


def rows(pairs: Sequence[Pair]) -> list[str | None]:
    return [RATIONALES[number % 4] for number in range(len(pairs))]


def test_the_score_of_a_row_does_not_depend_on_the_other_rows(evaluator: Evaluator) -> None:
    pairs = make_pairs(40)
    evaluator.setup(SetupContext(pairs=pairs))
    whole = evaluator.score(pairs, rows(pairs))
    assert len(whole) == 40
    assert all(math.isfinite(value) for value in whole)
    alone = [evaluator.score([pair], [text])[0] for pair, text in zip(pairs, rows(pairs), strict=True)]
    assert alone == pytest.approx(whole, abs=1e-4)
    assert len({round(value, 6) for value in whole}) > 10
    assert evaluator.score([], []) == []


def test_every_score_depends_on_the_rationale(evaluator: Evaluator) -> None:
    pairs = make_pairs(12)
    evaluator.setup(SetupContext(pairs=pairs))
    assert evaluator.score(pairs, ["red apple"] * 12) != evaluator.score(pairs, [None] * 12)


def test_every_evaluator_encodes_a_prompt_once_for_all_its_arms(evaluator: Evaluator) -> None:
    pairs = make_pairs(6)
    arms = (None, "chile peso", "peru lima sol", "red apple", "blue dog left")
    evaluator.setup(SetupContext(pairs=pairs))
    evaluator.score(pairs, [None] * 6)  # computes what is needed only once
    inner = evaluator.evaluator if isinstance(evaluator, PlausibleEvaluator) else evaluator  # both use the same model
    backbone = inner._bound() if isinstance(inner, JudgeEvaluator) else inner._frozen().backbone
    together, alone = [], []
    for rows, sharing in ((together, True), (alone, False)):
        before = backbone.cells
        each = [pair if sharing else replace(pair, query=replace(pair.query)) for pair in pairs for _ in arms]
        rows += evaluator.score(each, list(arms) * 6)
        rows.append(backbone.cells - before)
    assert together[:-1] == pytest.approx(alone[:-1], abs=1e-4)
    assert together[-1] < 0.8 * alone[-1]


def test_every_evaluator_has_settings_for_the_hash(evaluator: Evaluator) -> None:
    assert json.loads(json.dumps(evaluator.settings)) == evaluator.settings


def test_the_settings_of_every_evaluator_depend_on_the_limits_of_its_model(evaluator: Evaluator) -> None:
    class Seeing(FakeBackbone):
        prompt_settings = {"picture_size": {"longest_edge": 4096}}

    before = evaluator.settings
    for other in (FakeBackbone(seed=1, max_rationale_tokens=3), Seeing(seed=1)):
        evaluator.setup(SetupContext(model=Model(other, model()[1])))
        assert evaluator.settings != before


def test_every_evaluator_scores_the_same_after_it_released_its_memory(evaluator: Evaluator) -> None:
    pairs = make_pairs(12)
    evaluator.setup(SetupContext(pairs=pairs))
    before = evaluator.score(pairs, rows(pairs))
    evaluator.release()
    assert evaluator.score(pairs, rows(pairs)) == before


def test_retrieval_is_the_log_softmax_of_the_true_target_among_other_targets_of_the_task() -> None:
    pairs = make_pairs(40)
    evaluator = bound(temperature=0.2)
    evaluator.setup(SetupContext(pairs=pairs))
    encoder = Encoder(*model())
    found = evaluator.score(pairs, rows(pairs))
    for pair, text, value in zip(pairs, rows(pairs), found, strict=True):
        others = {p.positive_id: p.positive for p in pairs if p.task == pair.task and p.positive_id != pair.positive_id}
        query = encoder.encode_queries([pair.query], [text])[0]
        cosines = encoder.encode_targets([pair.positive, *others.values()]) @ query
        assert value == pytest.approx((cosines / 0.2).log_softmax(0)[0].item(), abs=1e-4)


@pytest.mark.parametrize("negatives", [1, 3, 5])
def test_retrieval_compares_every_pair_with_equally_many_negatives(negatives: int) -> None:
    class Alike:
        """Gives equal embeddings, so that a score is minus the log of the number of targets."""

        def encode_queries(self, items: Sequence[Item], rationales: object = None) -> Tensor:
            return torch.eye(4)[torch.zeros(len(items), dtype=torch.int64)]

        encode_targets = encode_queries

    pairs = make_pairs(36)
    evaluator = RetrievalEvaluator(negatives=negatives)
    evaluator._encoder = Alike()  # type: ignore[assignment]
    evaluator.setup(SetupContext(pairs=pairs))
    assert evaluator.score(pairs, [None] * 36) == pytest.approx([-math.log(1 + negatives)] * 36)


def test_the_negatives_of_retrieval_depend_on_its_seed_only() -> None:
    pairs = make_pairs(36)
    evaluators = [bound(negatives=3), bound(negatives=3), bound(negatives=3, seed=1)]
    for evaluator, bank in zip(evaluators, (pairs, pairs[::-1], pairs), strict=True):
        evaluator.setup(SetupContext(pairs=bank))
    one, reordered, other = (evaluator.score(pairs, [None] * 36) for evaluator in evaluators)
    assert one == pytest.approx(reordered, abs=1e-5)
    assert one != pytest.approx(other, abs=1e-2)


def test_retrieval_embeds_the_bank_once() -> None:
    pairs = make_pairs(36)
    backbone, pooler = model()
    evaluator = RetrievalEvaluator()
    evaluator.setup(SetupContext(model=Model(backbone, pooler)))
    evaluator.setup(SetupContext(pairs=pairs))
    evaluator.score(pairs[:2], [None, None])
    before = len(backbone.calls)
    evaluator.score(pairs[:2], [None, None])
    assert len(backbone.calls) - before == 1  # only the queries


def test_retrieval_drops_the_embeddings_of_another_model() -> None:
    pairs = make_pairs(36)
    evaluator = bound()
    evaluator.setup(SetupContext(pairs=pairs))
    first = evaluator.score(pairs, [None] * 36)
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    evaluator.setup(SetupContext(model=Model(FakeBackbone(seed=2), pooler)))
    second = evaluator.score(pairs, [None] * 36)
    fresh = RetrievalEvaluator()
    fresh.setup(SetupContext(model=Model(FakeBackbone(seed=2), pooler)))
    fresh.setup(SetupContext(pairs=pairs))
    assert second == fresh.score(pairs, [None] * 36) != first


def test_a_task_with_one_target_gives_a_warning_and_scores_zero() -> None:
    pairs = make_pairs(3, tasks=1)
    evaluator = bound()
    with pytest.warns(UserWarning, match="the task 'task-0' has only one target"):
        evaluator.setup(SetupContext(pairs=pairs))
    assert evaluator.score(pairs, [None] * 3) == pytest.approx([0.0] * 3)


def test_the_error_names_a_task_without_a_bank() -> None:
    evaluator = bound()
    evaluator.setup(SetupContext(pairs=make_pairs(8)))
    with pytest.raises(ValueError, match="no negatives for the task 'task-2', only for: task-0, task-1"):
        evaluator.score(make_pairs(9, tasks=3), [None] * 9)


def test_an_evaluator_without_a_model_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"no embedder; pass embedder=, or call setup with the model"):
        _ = RetrievalEvaluator().settings


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"negatives": 0}])
def test_settings_outside_their_range_are_errors(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"evaluators\.retrieval\.{name} is {value}; give"):
        RetrievalEvaluator(**options)


def test_a_separate_embedder_is_loaded_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, dict[str, Any]]] = []
    backbone, pooler = model()

    def create(kind: str, name: str, **arguments: Any) -> Any:
        loaded.append((name, arguments))
        return backbone if kind == "backbone" else pooler

    monkeypatch.setattr(embedder, "create", create)
    evaluator = RetrievalEvaluator("some/folder")
    evaluator.setup(SetupContext(model=Model(FakeBackbone(seed=9), pooler)))
    pairs = make_pairs(20)
    evaluator.setup(SetupContext(pairs=pairs))
    scores = evaluator.score(pairs, [None] * 20)
    assert loaded == [("transformers", {"model": "some/folder"}), ("embed_token", {})]
    expected = bound()
    expected.setup(SetupContext(pairs=pairs))
    assert scores == pytest.approx(expected.score(pairs, [None] * 20))
    assert evaluator.settings == expected.settings
    evaluator.release()
    assert evaluator._encoder is None
    assert evaluator.score(pairs, [None] * 20) == scores
    assert len(loaded) == 4


def test_a_saved_embedder_scores_as_the_model_it_was_saved_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone, pooler = create("backbone", "tiny", weights="random"), create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    folder = Embedder(backbone, pooler).save(tmp_path / "embedder")
    pairs = load_pairs("train", tasks=["fact"])[:4]
    bound, loaded = RetrievalEvaluator(), RetrievalEvaluator(str(folder))
    bound.setup(SetupContext(model=Model(backbone, pooler)))
    for evaluator in (bound, loaded):
        evaluator.setup(SetupContext(pairs=pairs))
    texts = [None, "chile", None, "peso"]
    assert loaded.score(pairs, texts) == pytest.approx(bound.score(pairs, texts), abs=1e-4)


def judge(**options: Any) -> JudgeEvaluator:
    made = JudgeEvaluator(**{**ARGUMENTS["judge"], **options})
    made.setup(SetupContext(model=Model(*model())))
    return made


def test_the_judge_compares_the_logits_of_yes_and_no_after_prompt_and_reasoning() -> None:
    evaluator, (backbone, _) = judge(question="answer left or right"), model()
    pairs = make_pairs(8)
    found = evaluator.score(pairs, rows(pairs))
    yes, no = backbone.tokenize("left right")
    for pair, text, value in zip(pairs, rows(pairs), found, strict=True):
        asked = f"{pair.query.instruction} {pair.query.text} {pair.positive.text} answer left or right"
        begun = ("" if text is None else f"red {text} blue ") + "what is"
        inputs = backbone.prepare([Item("", (Text(f"{asked} {begun}"),))], embed=False)
        logits = backbone.logits(backbone(inputs)[0, -1])
        assert value == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)


def test_a_separate_judge_is_kept_and_described_by_the_settings() -> None:
    own = FakeBackbone(seed=5)
    evaluator = judge(backbone=own)
    pairs = make_pairs(4)
    assert evaluator.score(pairs, [None] * 4) != judge().score(pairs, [None] * 4)
    assert evaluator.settings["weights"] != judge().settings["weights"]
    assert judge(question="what").settings != judge().settings == judge().settings


def test_a_separate_judge_is_on_the_scoring_device_only_while_it_scores() -> None:
    class Moving(FakeBackbone):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moved.append(str(device))
            return self

    moved: list[str] = []
    own, bound = judge(backbone=Moving()), JudgeEvaluator(**ARGUMENTS["judge"])
    own.score(make_pairs(2), [None] * 2)
    own.release()
    assert moved == ["cpu", "cpu"]
    for _ in range(2):
        bound.setup(SetupContext(model=Model(Moving(), model()[1])))
    bound.score(make_pairs(2), [None] * 2)
    bound.release()  # the model in training stays on its device
    assert moved == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yes": "red apple"}, r"yes is 'red apple', which is 2 tokens of fake \('red', 'apple'\); expected one"),
        ({"no": "unheard"}, r"no is 'unheard', which is 0 tokens of fake \(nothing\); expected one"),
        ({"no": "left"}, "yes 'left' and no 'left' are the same token"),
        ({"answer": "unheard"}, "answer is 'unheard', which gives no token"),
    ],
)
def test_a_judge_checks_its_answers_when_it_gets_its_model(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(**options)
    with pytest.raises(ValueError, match=message):
        JudgeEvaluator(FakeBackbone(), **{**ARGUMENTS["judge"], **options})


def test_a_judge_needs_a_place_for_the_rationale_and_a_model() -> None:
    with pytest.raises(ValueError, match=r"reasoning is 'because'; it must contain \{rationale\}"):
        JudgeEvaluator(reasoning="because")
    with pytest.raises(ValueError, match="no model yet; pass backbone="):
        JudgeEvaluator().score(make_pairs(1), [None])


def test_the_error_for_the_tiny_model_says_that_yes_is_not_one_token() -> None:
    with pytest.raises(ValueError, match=r"yes is ' Yes', which is 3 tokens of tiny@"):
        JudgeEvaluator(create("backbone", "tiny", weights="random"))


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
def test_a_judge_reads_pictures_and_encodes_them_once(
    family: str, make_backbone: Callable[..., Any], picture: Callable[..., Any]
) -> None:
    backbone = make_backbone(family)
    word = next(word for word in ("red", " red", " a", "a") if len(backbone.tokenize(word)) == 1)
    evaluator = JudgeEvaluator(backbone, yes=word, no=",", answer="answer", batch_size=3)
    pairs = [
        Pair(
            f"p{seed}", "t", Item("what", (Image(picture(seed=seed)),)), Item("", (Image(picture(seed=seed + 9)),)), "t"
        )
        for seed in range(2)
    ]
    arms = [None, "a red dog", "apple"]
    whole = evaluator.score([pair for pair in pairs for _ in arms], arms * 2)
    alone = [evaluator.score([pair], [text])[0] for pair in pairs for text in arms]
    assert whole == pytest.approx(alone, abs=1e-3)
    assert len({round(value, 4) for value in whole}) == 6
