"""`mmemb rationales` over a small file of pairs and a model of random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmemb.training.module import EmbeddingModule

Cli = Callable[..., Any]

SETTINGS: dict[str, Any] = {
    "seed_everything": 1,
    "model": {
        "backbone": {"class_path": "tiny", "init_args": {"weights": "random"}},
        "pooler": "embed_token",
        "phases": [{"objective": {"joint": {"chunk_size": 2}}}],
        "selector": "counterfactual",
        "pool": {"path": "pool", "workers": ["metadata"], "evaluator": "retrieval", "candidates": 2},
    },
    "data": {"train": [{"path": "pairs.jsonl"}], "batch_size": 2, "sub_batch_size": 2},
}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": f"pair{number}",
            "task": "capital" if number % 2 else "colour",
            "query": {"text": f"number {number}", "fields": {"rationale": f"after {number - 1} comes {number}"}},
            "positive": {"text": word},
        }
        for number, word in enumerate(("zero", "one", "two", "three", "four", "five"))
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("a.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")


def rationales(cli: Cli, action: str, *words: str) -> Any:
    return cli("rationales", action, "--config", "a.yaml", *words)


def test_generate_score_show(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, _, err = rationales(cli, "show")
    assert code == 2
    assert "mmemb rationales generate" in err

    assert rationales(cli, "generate").code == 0
    code, out, _ = rationales(cli, "show", "--pair", "pair3")
    assert code == 0
    assert "after 2 comes 3" in out
    assert "▶" not in out  # nothing is chosen before it is scored

    assert rationales(cli, "score").code == 0
    code, out, _ = rationales(cli, "show", "--limit", "1")
    assert code == 0
    assert out.count("╭") == 2  # one pair of each task
    assert re.search(r"[+-]\d+\.\d{3}  after \d comes \d", out)  # the gain, then the rationale
    code, out, _ = rationales(cli, "show", "--task", "colour", "--limit", "9")
    assert "pair0" in out
    assert "pair4" in out
    assert "pair1" not in out


def test_an_evaluator_that_wraps_another_is_named_in_yaml(cli: Cli) -> None:
    checked = {"class_path": "plausible", "init_args": {"evaluator": "retrieval", "alternatives": 2}}
    Path("b.yaml").write_text(yaml.safe_dump({"model": {"pool": {"path": "pool", "evaluator": checked}}}))
    assert rationales(cli, "generate").code == 0
    for words in (("score",), ("score", "--config", "b.yaml")):
        assert rationales(cli, *words).code == 0
    manifest = json.loads(Path("pool/manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["evaluators"]) == {"plausible", "retrieval"}
    assert manifest["evaluators"]["plausible"]["of"] == {
        "evaluator": "retrieval",
        **manifest["evaluators"]["retrieval"],
    }
    code, _, err = rationales(cli, "score", "--config", "b.yaml", "--model.pool.evaluator.alternatives", "3")
    assert code == 2  # other settings than the scores that are there
    assert "plausible" in err


def test_the_model_is_put_where_fit_would_train(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    monkeypatch.setattr(EmbeddingModule, "to", lambda self, device: placed.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rationales(cli, "generate").code == 0
    assert rationales(cli, "score", "--trainer.accelerator", "cpu").code == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rationales(cli, "score").code == 0
    assert placed == ["cuda", "cpu", "cpu"]


def test_show_chooses_where_the_selector_can(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = ("--model.pool.shard_size", "4")
    assert rationales(cli, "generate", *words).code == 0
    code, out, err = rationales(cli, "show", "--limit", "9")
    assert code == 0
    assert "for 6 of 6 pairs: pair 'pair1': its rationale candidates have not been scored" in err
    code, out, err = rationales(cli, "show", "--limit", "9", "--model.selector", "random")  # needs no scores
    assert code == 0
    assert out.count("▶") == 6
    assert "no choice" not in err

    assert rationales(cli, "score", *words).code == 0
    Path("pool/scores-retrieval-000000004.parquet").unlink()  # as a run leaves it that was stopped after one shard
    code, out, err = rationales(cli, "show", "--limit", "9")
    assert code == 0
    assert out.count("╭") == 6
    assert "for 2 of 6 pairs: pair 'pair5'" in err


def test_stats_counts_by_task_and_worker_and_writes_a_page(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert rationales(cli, "generate").code == 0
    code, out, _ = rationales(cli, "stats")
    assert code == 0
    assert re.search(r"colour +metadata +3 +- +- +- +0 +", out)  # nothing is scored yet
    assert "No candidate has been scored yet" in Path("rationales.html").read_text(encoding="utf-8")

    assert rationales(cli, "score").code == 0
    code, out, err = rationales(cli, "stats", "--output", "reports/pool.html")
    assert code == 0
    for group in ("capital +metadata +3", "colour +metadata +3", "all +metadata +6"):
        assert re.search(group + r" +\d+\.\d% +[+-]\d\.\d{3} +(\d+\.\d%|-) +0 +", out), out
    assert "reports/pool.html" in err
    page = Path("reports/pool.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # two tasks, and all
    assert "<td>colour</td><td>metadata</td><td>3</td>" in page
    assert "scored by</dt><dd>retrieval" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)  # needs nothing else

    code, out, _ = rationales(cli, "stats", "--task", "colour")
    assert "capital" not in out


def test_stats_never_cuts_a_name_where_there_is_no_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    task = "a_task_of_a_name_that_is_as_long_as_half_a_line_[of]_a_terminal_of_80_columns"
    text = Path("pairs.jsonl").read_text(encoding="utf-8").replace('"colour"', f'"{task}"')
    Path("pairs.jsonl").write_text(text, encoding="utf-8")
    assert rationales(cli, "generate").code == 0
    out = rationales(cli, "stats").out
    assert re.search(re.escape(task) + " +metadata +3 ", out), out
    assert re.search("task +worker +candidates +keep rate +mean gain +placebo share +leaks +tokens", out), out


def test_stats_and_show_refuse_what_is_not_asked_for(cli: Cli) -> None:
    assert rationales(cli, "generate").code == 0
    assert rationales(cli, "score").code == 0
    judge = ("--model.pool.evaluator", "judge")
    for action in ("stats", "show"):
        code, out, err = rationales(cli, action, *judge)
        assert (code, out) == (2, "")
        assert "no scores by the evaluator 'judge', only by: retrieval" in err.splitlines()[-1]
    text = Path("pairs.jsonl").read_text(encoding="utf-8")
    Path("pairs.jsonl").write_text(text.replace("number ", "digit "), encoding="utf-8")
    for action in ("stats", "show"):
        code, out, err = rationales(cli, action)
        assert (code, out) == (2, "")
        assert "made from other data" in err.splitlines()[-1]


def test_mistakes_in_what_to_show(cli: Cli) -> None:
    assert rationales(cli, "generate").code == 0
    assert "the data has the tasks capital, colour" in rationales(cli, "show", "--task", "nope").err
    assert "none of the 6 pairs has this id" in rationales(cli, "show", "--pair", "nope").err
