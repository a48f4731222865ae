"""The vocabulary of results: every name has a meaning, a place in the order and one format."""

from __future__ import annotations

import pytest

from mmemb import registry
from mmemb.common import vocabulary
from mmemb.common.vocabulary import ROWS, SCORES, before_phase, legend, markdown_legend, ordered, row_meaning, shown
from mmemb.evaluation import runner


def test_every_controller_of_the_package_is_a_row() -> None:
    assert {listing.name for listing in registry.listings() if listing.kind == "controller"} <= set(ROWS)


def test_every_mean_of_the_runner_is_a_score_or_the_row_chance() -> None:
    assert set(runner.MEANS) - {vocabulary.CHANCE} <= set(SCORES)


@pytest.mark.parametrize("meaning", [*ROWS.values(), *(score.meaning for score in SCORES.values())])
def test_every_meaning_is_a_sentence_of_at_most_30_words(meaning: str) -> None:
    assert meaning.endswith(".")
    assert all(len(sentence.split()) <= 30 for sentence in meaning.split(". "))


def test_rows_before_a_phase_and_other_controllers_have_a_meaning() -> None:
    assert before_phase("always_reason", "control") == "always_reason_before_control"
    assert row_meaning("always_reason_before_control") == "The row always_reason, scored before the control phase."
    assert row_meaning("before_training") == ROWS["before_training"]
    assert row_meaning("mine") == "The controller mine of this run's configuration."


def test_known_rows_come_first_and_in_order() -> None:
    assert ordered(["mine", "rl", "never_before_control", "never"]) == ["never", "rl", "mine", "never_before_control"]


def test_the_legend_has_the_rows_and_then_the_scores() -> None:
    assert list(legend(["rl", "never"], ["hit@1"])) == ["never", "rl", "hit@1"]
    assert markdown_legend(["never"], [])[2:] == [f"| `never` | {ROWS['never']} |"]
    with pytest.raises(KeyError, match="think_rate"):
        legend([], ["think_rate"])


def test_shares_are_shown_as_fractions_with_three_decimals() -> None:
    assert [shown("hit@1", 0.5), shown("queries_per_second", 12.34), shown("n", 4), shown("mrr", None)] == [
        "0.500",
        "12.3",
        "4",
        "",
    ]


def test_a_vertical_bar_inside_a_cell_does_not_end_the_cell() -> None:
    assert vocabulary.markdown_table(["a", "b"], [["x|y", "1"]]) == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
