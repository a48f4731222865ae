"""Tests that the selectors benchmark counts selection correctly, and changes only the documented recipe settings."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import yaml

from benchmarks import r1_seeds, selectors
from mmemb.components.workers.corrupting import CorruptingWorker
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.interfaces import Evaluator
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import score
from mmemb.types import Pair
from tests.unit.rationales.fakes import make_pairs


class Honest(Evaluator):
    """Knows which rationale is the pair's own, and scores the opposite for every fifth pair."""

    def setup(self, context: object) -> None: ...

    def score(self, pairs: list[Pair], rationales: list[str | None]) -> list[float]:  # type: ignore[override]
        return [
            -1.0 if text is None else -1.0 + (0.5 if (text == pair.query.fields["rationale"]) != odd(pair) else -0.5)
            for pair, text in zip(pairs, rationales, strict=True)
        ]

    settings = {"of": "honesty"}


def odd(pair: Pair) -> bool:
    return int(pair.query.fields["number"]) % 5 == 0


@pytest.fixture
def pool(tmp_path: Path) -> RationalePool:
    workers = [MetadataWorker(), CorruptingWorker(MetadataWorker(), share=1.0)]
    generate(make_pairs(40), workers, 1, pool=tmp_path / "pool", seed=0, progress=False)
    return score(make_pairs(40), Honest(), tmp_path / "pool", progress=False)


def test_selection_is_compared_with_the_known_corruption(pool: RationalePool) -> None:
    found = {
        (each.selector, each.task): each for each in selectors.selection(pool, make_pairs(40), ["task-0", "task-1"])
    }
    for name in ("counterfactual", "best_of"):
        of_all = found[name, "all"]
        assert of_all.precision == of_all.recall == of_all.keeps_good == of_all.rejects_corrupted == 0.8
    for kind in ("wrong_entity", "empty_talk", "shuffled"):
        misjudged = [
            odd(pair)
            for pair in make_pairs(40)
            if any(each.corruption == kind for each in pool.candidates(pair.id).rationales)
        ]
        assert getattr(found["best_of", "all"], f"rejects_{kind}") == pytest.approx(1 - statistics.mean(misjudged))
    oracle, random = found["oracle", "all"], found["random", "all"]
    assert oracle.precision == 0.8
    assert {each.evaluator for each in found.values()} == {"Honest"}
    assert oracle.none == -1.0
    assert oracle.keeps_good is None  # it has no margin
    assert random.precision == pytest.approx(0.5, abs=0.1)
    assert statistics.mean([found["best_of", task].precision or 0 for task in ("task-0", "task-1")]) == 0.8
    assert ("best_of", "reasoning") not in found  # none of these tasks


def test_a_run_changes_only_tasks_and_length() -> None:
    made = selectors.overlay(["fact", "scenematch"], steps=7)
    assert made["trainer"]["max_steps"] == 7
    recipe = yaml.safe_load(r1_seeds.RECIPE.read_text(encoding="utf-8"))["data"]["train"]
    weights = {task: source.get("weight", 1.0) for source in recipe for task in source["tasks"]}
    found = {task: source.get("weight", 1.0) for source in made["data"]["train"] for task in source["tasks"]}
    assert found == {task: weights[task] for task in ("fact", "scenematch")}
    with pytest.raises(ValueError, match="--tasks nope: the recipe has fact, findscene"):
        selectors.overlay(["nope"], steps=7)
    some = selectors.overlay(["fact"], steps=7, pairs=5)["data"]
    assert some["train"][0]["limit"] == 5
    assert "limit" not in some["test"][0]


def test_a_user_can_name_another_selector(pool: RationalePool, capsys: pytest.CaptureFixture[str]) -> None:
    mine = "mmemb.components.selectors.best_of.BestOf"
    options = selectors.options_of(["--selectors", "none", mine, "all", "--pairs", "9"])
    assert (options.selectors, options.pairs) == (["none", mine, "all"], 9)
    found = {each.selector: each for each in selectors.selection(pool, make_pairs(40), ["task-0"], options.selectors)}
    assert list(found) == [mine, "all"]
    assert found[mine].precision == 0.8
    for name, told in (
        ("nope", "no selector named 'nope'"),
        ("no.Such", "--selectors no.Such: No module"),
        ("json.JSONDecoder", "not a selector"),
    ):
        with pytest.raises(SystemExit):
            selectors.options_of(["--selectors", name])
        assert told in capsys.readouterr().err


def test_training_uses_the_margin_of_the_evaluator_that_it_reads() -> None:
    assert next(iter(selectors.MARGINS)) == min(selectors.MARGINS)  # a pool opens with the first evaluator by name
    margin = selectors.MARGINS["plausible"]
    assert selectors._with_margin("counterfactual") == {"class_path": "counterfactual", "init_args": {"margin": margin}}
    assert selectors._with_margin("oracle") == "oracle"
    assert selectors.selector_of("best_of", -0.5).margin == -0.5  # type: ignore[attr-defined]
    assert not hasattr(selectors.selector_of("random", -0.5), "margin")


def test_hits_are_means_over_seeds_by_row_and_task() -> None:
    def run(selector: str, hit: float, modes: tuple[str, ...]) -> dict[str, object]:
        row = {"hit@1": hit, "by_task": {"fact": {"hit@1": hit}, "name": {"hit@1": 0.5}}}
        return {"selector": selector, "modes": dict.fromkeys(modes, row), "seconds": 10.0}

    runs = [run("none", 0.25, ("never",)), *(run("random", hit, ("never", "always_reason")) for hit in (0.2, 0.4))]
    rows = selectors.hits(runs, ["fact", "name"])
    assert [(row["selector"], row["row"]) for row in rows] == [
        ("none", "never"),
        ("random", "never"),
        ("random", "always_reason"),
    ]
    assert rows[0]["fact"] == rows[0]["reasoning"] == "0.250"
    assert rows[2]["fact"] == rows[2]["reasoning"] == "0.300±0.141"
    assert rows[2]["name"] == "0.500±0.000"


def test_a_folder_of_runs_is_not_mistaken_for_the_selector_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(selectors.r1_seeds, "run", lambda seed, *, folder, at_once, extra: seen.append(folder) or {})
    selectors.train("random", 1, folder=tmp_path, settings={"model": {}}, pool=tmp_path / "pool", at_once=1)
    assert seen[0].parent == tmp_path
    assert seen[0].name not in selectors.SELECTORS
