"""Leak checks: which parts of the other side a rationale may contain, and which not."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mmemb.rationales.generate import generate
from mmemb.rationales.leaks import LeakCheck, words
from mmemb.rationales.pool import RationalePool
from mmemb.types import Item, Rationale, Text
from tests.unit.rationales.fakes import Numbered, make_pairs

TARGET = "A small brown dog is running across the wet beach"
QUERY = Item("find the caption", (Text("an animal by the sea"),), {"answer": "dog", "breed": "terrier"})
HIDDEN = Item("", (Text(TARGET),), {"alt": "photo taken by ann smith in wales", "answer": "running dog"})


def flags(text: str, *, shown: Item = QUERY, hidden: Item = HIDDEN, **settings: object) -> tuple[str, ...]:
    return LeakCheck(**settings).flags([text], shown=shown, hidden=hidden)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TARGET, ("verbatim", "near_duplicate")),
        (f"I think: {TARGET.upper()}!", ("verbatim", "near_duplicate")),
        ("a small brown dog is running across the beach , wet", ()),  # 5 of 8 n-grams
        ("a small brown dog is running across the wet shore", ("near_duplicate",)),  # 7 of 8
        ("an animal by the sea , maybe a dog that runs", ()),
        ("Photo taken by Ann Smith in Wales", ("verbatim",)),  # a field that only the target has
        ("", ()),
    ],
)
def test_leaks_in_a_rationale(text: str, found: tuple[str, ...]) -> None:
    assert flags(text) == found


def test_a_text_that_the_query_has_too_is_no_leak() -> None:
    shown = Item("repeat", (Text(f"please find: {TARGET}"),))
    assert flags(TARGET, shown=shown) == ()
    most = Item("repeat", (Text("a small brown dog is running across the wet"),))
    assert "near_duplicate" not in flags("running across the wet beach", shown=most)


def test_a_short_answer_is_no_leak() -> None:
    hidden = Item("", (Text("brown dog"),))
    assert flags("it is a brown dog", hidden=hidden) == ()
    assert flags("it is a brown dog", hidden=hidden, min_words=2, ngram=2) == ("verbatim", "near_duplicate")


def test_named_fields_count_at_any_length_on_either_side() -> None:
    assert flags("a dog") == ()
    assert flags("a dog", target_fields=["answer"]) == ("field",)
    assert flags("a terrier", target_fields=["answer", "breed"]) == ("field",)
    assert flags("an animal", target_fields=["answer"]) == ()
    shown = Item("is it a dog ?", (Text("picture"),), {"answer": "dog"})
    assert flags("a dog", shown=shown, hidden=Item("", (Text("yes"),)), target_fields=["answer"]) == ()


def test_scripts_without_blanks_are_compared_by_character() -> None:
    assert words("犬が走る dog2 Straße") == ["犬", "が", "走", "る", "dog2", "strasse"]
    hidden = Item("", (Text("犬が海岸を走る"),))
    assert flags("これは犬が海岸を走る絵", hidden=hidden) == ("verbatim", "near_duplicate")


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leaks\.min_words is 2; give 3 or more"):
        LeakCheck(min_words=2)
    with pytest.raises(ValueError, match=r"leaks\.overlap is 0; give"):
        LeakCheck(overlap=0)


class Telling(Numbered):
    """A worker that has memorised the targets of odd pairs."""

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        found = super().propose(items, k, seed=seed)
        for item, rationales in zip(items, found, strict=True):
            if int(item.fields["number"]) % 2:
                rationales.append(Rationale(f"the long text of target {item.fields['number']}"))
        return found


def test_leaks_are_stored_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        replace(pair, positive=Item("", (Text(f"The long text of target {number}"),)))
        for number, pair in enumerate(make_pairs(10))
    ]
    pool = generate(pairs, [Telling()], 2, pool=tmp_path / "pool", seed=0)
    assert "5 of them flagged as leaks" in capsys.readouterr().err
    everything = RationalePool.open(tmp_path / "pool", keep_leaks=True)
    for number, pair in enumerate(pairs):
        clean, all_of = pool.candidates(pair.id).rationales, everything.candidates(pair.id).rationales
        assert all(not each.leaks for each in clean)
        assert len(all_of) - len(clean) == number % 2
        if number % 2:
            assert all_of[-1].leaks == ("verbatim", "near_duplicate")
    travelled = pickle.loads(pickle.dumps(everything))
    assert travelled.candidates("pair-1") == everything.candidates("pair-1")


def test_a_pool_with_another_leak_check_is_refused(tmp_path: Path) -> None:
    pairs = make_pairs(3)
    generate(pairs, [Numbered()], 2, pool=tmp_path / "pool", seed=0, progress=False)
    with pytest.raises(ValueError, match="other workers, k, seed, sides or leak check"):
        generate(pairs, [Numbered()], 2, pool=tmp_path / "pool", seed=0, leaks=LeakCheck(min_words=9), progress=False)


def test_a_rationale_of_the_target_must_not_contain_the_query(tmp_path: Path) -> None:
    pairs = [
        replace(pair, query=replace(pair.query, parts=(Text(f"it is a thing {n}"),)))
        for n, pair in enumerate(make_pairs(4))
    ]
    asked: list[str] = []

    class Looking(Numbered):
        def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
            asked.extend(item.text for item in items)
            return [[Rationale(f"it is a thing {n}"), Rationale("clean")] for n in range(len(items))]

    pool = generate(
        pairs, [Looking()], 2, pool=tmp_path / "pool", seed=0, sides=["target", "query"], shard_size=4, progress=False
    )
    assert asked == [pair.positive.text for pair in pairs] + [pair.query.text for pair in pairs]
    for number, pair in enumerate(pairs):
        assert [each.text for each in pool.candidates(pair.id, side="target").rationales] == ["clean"]
        assert [each.text for each in pool.candidates(pair.id).rationales] == [f"it is a thing {number}", "clean"]
    with pytest.raises(ValueError, match=r"sides is \['both'\]; give query, target or both"):
        generate(pairs, [Looking()], 2, pool=tmp_path / "other", seed=0, sides=["both"])  # type: ignore[list-item]
