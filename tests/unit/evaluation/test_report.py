"""The report of an evaluation: the summary's schema, complete files, readable tables, pictures, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mmemb.common.vocabulary import ROWS, SCORES, ordered
from mmemb.drawing.cards import RIGHT, WRONG
from mmemb.drawing.curves import draw_curves, quality_curves, write_curves
from mmemb.drawing.gallery import choose, draw_gallery
from mmemb.evaluation.report import markdown, print_table, publish, summary, versions, write_summary
from mmemb.evaluation.runner import mode_scores
from mmemb.types import EvaluationResults, EvaluationTask, Image, Item, Pair, QueryRecord, Text


def scores(hit: float, tokens: float = 0.0, *, n: int = 4, candidates: int = 20) -> dict[str, float]:
    return {
        "hit@1": hit,
        "hit@5": hit,
        "mrr": hit,
        "n": n,
        "candidates": candidates,
        "invocation_rate": float(tokens > 0),
        "tokens_per_query": tokens,
        "chance": 1 / candidates,
        "queries_per_second": 9.0,
    }


def record(
    row: int, task: str, *, direct: float, reasoned: float | None, tokens: int, confidence: float
) -> QueryRecord:
    picture = Image(PILImage.new("RGB", (8, 8), "#3333ff"))
    query = Item("what is shown", (picture,) if row % 2 else (Text(f"query {row}"),))
    return QueryRecord(
        task=task,
        pair=Pair(f"{task}/{row}", task, query, Item("", (Text("t0"),)), "t0"),
        confidence=confidence,
        direct_rank=1.0 if direct else 7.5,
        direct_hit=direct,
        direct_top=("t0", "t1", "t2") if direct else ("t1", "t2", "t3"),
        reasoned_rank=None if reasoned is None else 1.0 if reasoned else 4.0,
        reasoned_hit=reasoned,
        reasoned_top=None if reasoned is None else ("t0", "t1", "t2") if reasoned else ("t2", "t1", "t0"),
        utility=None if reasoned is None else reasoned - direct,
        rationale="" if reasoned is None else "the flag of chile, so the chilean peso",
        tokens=tokens,
        margin=tokens - 8.0,
    )


@pytest.fixture
def results() -> EvaluationResults:
    candidates = [Item("", (Text(f"target {row}"),)) for row in range(20)]
    ids = [f"t{row}" for row in range(20)]
    records = [
        record(0, "flag_easy", direct=1, reasoned=1, tokens=4, confidence=0.9),
        record(1, "flag_easy", direct=1, reasoned=0, tokens=6, confidence=0.8),
        record(2, "scene", direct=0, reasoned=1, tokens=20, confidence=0.1),
        record(3, "scene", direct=0, reasoned=0, tokens=10, confidence=0.2),
    ]
    modes = {
        "never": mode_scores({"flag_easy": scores(1.0), "scene": scores(0.0)}),
        "always_reason": mode_scores({"flag_easy": scores(0.5, 5), "scene": scores(0.5, 15)}),
    }
    tasks = {name: EvaluationTask(name, [], candidates, ids) for name in ("flag_easy", "scene")}
    return EvaluationResults(modes, records, tasks)


def test_the_summary_has_exactly_the_schema(results: EvaluationResults) -> None:
    made = summary(results, settings={"seed": 1}, seconds=12.5)
    assert set(made) == {"settings", "modes", "versions", "seconds"}
    assert set(made["modes"]) == {"never", "always_reason", "chance"}
    for mode in made["modes"].values():
        assert {"hit@1", "invocation_rate", "tokens_per_query", "by_task"} <= set(mode)
    for name in ("never", "always_reason"):
        extra = {"queries_per_second", "gain_over_random_routing"}
        assert set(made["modes"][name]) == {"hit@1", "invocation_rate", "tokens_per_query", "by_task"} | extra
        for task in mode["by_task"].values():
            assert {"hit@1", "n", "candidates"} <= set(task)
    assert made["modes"]["always_reason"]["hit@1"] == 0.5
    assert made["modes"]["always_reason"]["tokens_per_query"] == 10
    assert made["modes"]["chance"]["hit@1"] == pytest.approx(0.05)
    assert made["modes"]["chance"]["by_task"]["scene"] == {
        "hit@1": 0.05,
        "n": 4,
        "candidates": 20,
        "invocation_rate": 0.0,
        "tokens_per_query": 0.0,
    }
    assert made["seconds"] == 12.5
    assert {"python", "torch", "mmemb"} <= set(versions())


def test_gain_over_random_routing_is_hit_above_the_line_from_never_to_always_reason(results: EvaluationResults) -> None:
    results.modes["rl"] = mode_scores({"flag_easy": scores(1.0, 1), "scene": scores(0.5, 4)})
    results.modes["always_reason"] = mode_scores({"flag_easy": scores(0.9, 5), "scene": scores(0.5, 15)})
    modes = summary(results, settings={}, seconds=1)["modes"]
    # Deciding at random with 2.5 of 10 tokens gives .5 + 1/4 (.7 - .5).
    assert modes["rl"]["gain_over_random_routing"] == pytest.approx(0.75 - 0.55)
    for row in ("never", "always_reason"):
        assert modes[row]["gain_over_random_routing"] == pytest.approx(0)
    assert "gain_over_random_routing" not in modes["chance"]
    page = markdown(summary(results, settings={}, seconds=1)).splitlines()
    assert (
        page[page.index("## invocation_rate by task") + 2] == "| task | n | candidates | never | always_reason | rl |"
    )
    assert "| scene | 4 | 20 | 0.000 | 15.000 | 4.000 |" in page[page.index("## tokens_per_query by task") :]
    assert "| rl | 0.750 | 0.750 | 0.750 | 1.000 | 2.500 | 9.0 | 0.200 |" in page


def test_rows_added_by_the_caller_are_reported_and_explained(results: EvaluationResults) -> None:
    scored = {"hit@1": 0.2, "by_task": {"flag_easy": {"hit@1": 0.2, "n": 4, "candidates": 20}}}
    results.modes |= {"before_training": scored, "never_before_control": scored}
    made = summary(results, settings={}, seconds=1)
    assert made["modes"]["before_training"]["hit@1"] == 0.2
    page = markdown(made)
    assert "| task | n | candidates | chance | before_training | never | always_reason | never_before_control |" in page
    assert "| `never_before_control` | The row never, scored before the control phase. |" in page


def test_summary_files_are_complete_and_valid(results: EvaluationResults, tmp_path: Path) -> None:
    made = summary(results, settings={"bad": math.nan, "nested": [math.inf, {"x": 1.0}]}, seconds=3)
    files = write_summary(tmp_path / "run", made)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["summary.json", "summary.md"]
    read = json.loads(files[0].read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read["settings"] == {"bad": None, "nested": [None, {"x": 1.0}]}
    assert read["modes"] == json.loads(json.dumps(made["modes"]))


def test_the_page_begins_with_a_legend_of_all_its_rows_and_scores(results: EvaluationResults) -> None:
    made = summary(results, settings={}, seconds=3)
    legend, _, tables = markdown(made).partition("## Means over tasks")
    explained = re.findall(r"(?m)^\| `(\S+)` \| .+\. \|$", legend)
    assert explained[:3] == ["chance", "never", "always_reason"]
    header = tables.strip().splitlines()[0].strip("| ").split(" | ")
    assert explained[3:] == [*header, "n", "candidates"]


def test_the_page_shows_tasks_means_and_costs_as_fractions(results: EvaluationResults) -> None:
    lines = markdown(summary(results, settings={"seed": 1}, seconds=3)).splitlines()
    assert "| task | n | candidates | chance | never | always_reason |" in lines
    assert "| flag_easy | 4 | 20 | 0.050 | 1.000 | 0.500 |" in lines
    assert "| mean |  |  | 0.050 | 0.500 | 0.500 |" in lines
    assert "| chance | 0.050 |  |  |  |  |  |  |" in lines
    assert "| always_reason | 0.500 | 0.500 | 0.500 | 1.000 | 10.000 | 9.0 | 0.000 |" in lines
    assert "| seed | `1` |" in lines
    for score in ("hit@5", "mrr"):
        section = lines[lines.index(f"## {score} by task") :]
        expected = [results.modes[mode]["by_task"]["flag_easy"][score] for mode in ("never", "always_reason")]
        cells = " | ".join(f"{value:.3f}" for value in expected)
        assert f"| flag_easy | 4 | 20 | {cells} |" in section


def test_the_tables_fit_a_terminal_and_keep_every_name(results: EvaluationResults) -> None:
    rows = ("rl", "true_rationale", "always_reason_before_control")
    results.modes |= {row: results.modes["always_reason"] for row in rows}
    made = summary(results, settings={}, seconds=3)
    console = Console(file=io.StringIO(), width=80)
    print_table(made, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    task = next(line for line in text.splitlines() if "flag_easy" in line)
    assert task.split() == ["flag_easy", "4", "20", "0.050", "1.000", "0.500", "0.500", "0.500", "0.500"]
    means = text[text.index("means over tasks") : text.index("hit@1 by task")]
    for part in (
        "invocation_",
        "per_second",
        "always_reason ",
        "true_rationale ",
        "always_reason_ ",
        "before_control ",
    ):
        assert part in means


def test_curves_equal_those_computed_by_hand(results: EvaluationResults) -> None:
    points = quality_curves(results.records, steps=4)
    threshold = [(p.invocation_rate, p.tokens_per_query, p.hit) for p in points if p.curve == "threshold"]
    # Least confident first: the scene query that gains (20 tokens), the other (10), the one that loses (6), the last.
    expected = [(0, 0, 0.5), (0.25, 5, 0.75), (0.5, 7.5, 0.75), (0.75, 9, 0.5), (1, 10, 0.5)]
    np.testing.assert_allclose(threshold, expected)
    # By the margin of the decision: 20, 10, 6, 4 tokens.
    rl = [(p.tokens_per_query, p.hit) for p in points if p.curve == "rl"]
    np.testing.assert_allclose(rl, [(0, 0.5), (5, 0.75), (7.5, 0.75), (9, 0.5), (10, 0.5)])
    oracle = [(p.tokens_per_query, p.hit) for p in points if p.curve == "oracle"]
    np.testing.assert_allclose([*oracle[:2], oracle[-1]], [(0, 0.5), (5, 0.75), (10, 0.5)])
    at_random = [(p.tokens_per_query, p.hit) for p in points if p.curve == "random"]
    np.testing.assert_allclose(at_random, [(0, 0.5), (10, 0.5)])


def test_curves_are_written_as_picture_and_table(results: EvaluationResults, tmp_path: Path) -> None:
    picture, table = write_curves(tmp_path, results)
    assert PILImage.open(picture).size[0] > 400
    rows = list(csv.DictReader(table.open()))
    assert {row["curve"] for row in rows} == {"rl", "threshold", "oracle", "random"}
    assert list(rows[0]) == ["curve", "invocation_rate", "tokens_per_query", "hit@1"]
    assert float(rows[0]["hit@1"]) == pytest.approx(0.5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quality_tokens.csv", "quality_tokens.png"]


def test_the_legend_of_the_curves_explains_every_row_above_the_axes(results: EvaluationResults) -> None:
    results.modes["never_before_control"] = results.modes["never"]
    figure = draw_curves(results)
    assert figure is not None
    figure.canvas.draw()
    [legend] = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.partition(":")[0] for text in texts] == ordered(
        {*results.modes, "rl", "threshold", "random", "oracle"}
    )
    assert texts[0] == f"never: {ROWS['never']}"
    [axes] = figure.axes
    for score, label in (("tokens_per_query", axes.get_xlabel()), ("hit@1", axes.get_ylabel())):
        assert label == f"{score}\n{SCORES[score].meaning}"
    box, plot = legend.get_window_extent(), axes.get_tightbbox()
    assert plot is not None
    assert box.y0 >= plot.y1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_there_are_no_curves_if_no_query_reasoned(results: EvaluationResults, tmp_path: Path) -> None:
    results.records = [record(0, "scene", direct=1, reasoned=None, tokens=0, confidence=0.5)]
    assert draw_curves(results) is None
    assert write_curves(tmp_path, results) == []


def test_the_gallery_shows_the_same_number_of_queries_per_task() -> None:
    many = [
        record(row, task, direct=1, reasoned=1, tokens=1, confidence=0.5)
        for task in "abc"
        for row in range(2 if task == "b" else 30)
    ]
    chosen = choose(many, 10)
    assert [each.task for each in chosen] == list("aaaabbccc")  # task b has only two queries
    assert [each.pair.id for each in chosen][:4] == ["a/3", "a/11", "a/18", "a/26"]
    assert choose([], 10) == []
    assert len(choose(many, 2)) == 2


def test_the_gallery_marks_right_and_wrong(results: EvaluationResults) -> None:
    def count(sheet: PILImage.Image, colour: str) -> int:
        rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        return int((np.asarray(sheet) == rgb).all(axis=-1).sum())

    results.records = results.records[:1]
    good = draw_gallery(results)
    assert count(good, RIGHT) > 1000
    results.records = [record(0, "scene", direct=0, reasoned=None, tokens=0, confidence=0.5)]
    bad = draw_gallery(results)
    assert count(bad, RIGHT) == 0
    assert count(bad, WRONG) > 1000
    assert good.size == bad.size


def test_publishing_writes_files_prints_tables_and_logs(
    results: EvaluationResults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = SummaryWriter(str(tmp_path / "logs"))
    made = summary(results, settings={}, seconds=3)
    files = publish(tmp_path / "run", made, results, logger=SimpleNamespace(experiment=writer), step=7)
    writer.close()
    assert {file.name for file in files} == {
        "summary.json",
        "summary.md",
        "gallery.png",
        "quality_tokens.png",
        "quality_tokens.csv",
    }
    assert all(file.is_file() for file in files)
    assert "flag_easy" in capsys.readouterr().out
    events: Any = EventAccumulator(str(tmp_path / "logs")).Reload()
    [scalar] = events.Scalars("evaluation/always_reason/hit@1")
    assert (scalar.step, scalar.value) == (7, 0.5)
    assert events.Scalars("evaluation_scene/never/hit@1")[0].value == 0.0
    for tag in (tag for tag in events.Tags()["scalars"] if tag.startswith("evaluation/")):
        _, row, score = tag.split("/")
        assert row in ROWS
        assert score in SCORES
    assert {"evaluation/gallery", "evaluation/quality_tokens"} <= set(events.Tags()["images"])


def test_publishing_needs_neither_logger_nor_records(results: EvaluationResults, tmp_path: Path) -> None:
    results.records = []
    made = summary(results, settings={}, seconds=3)
    assert len(publish(tmp_path, made, results)) == 2
    assert len(publish(tmp_path, made, results, logger=SimpleNamespace(experiment=object()))) == 2
