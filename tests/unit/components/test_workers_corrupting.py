"""Tests that the corrupting worker damages a known share in known ways and records every damage."""

from __future__ import annotations

from collections import Counter

import pytest

from mmemb.components.workers.corrupting import EMPTY_TALK, CorruptingWorker
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.components.workers.model import ModelWorker
from mmemb.interfaces import Model, SetupContext
from mmemb.types import Image, Item, Rationale, Text
from tests.unit.inference.fakes import FakeBackbone, FakePooler

ITEMS = [
    Item(task, (Text(f"{task} {number}"),), {"rationale": f"{task} number {number} of many", "short": f"w{number}"})
    for number in range(200)
    for task in ("colour", "shape")
]


def corrupted(
    share: float = 0.5, *, seed: int = 0, template: str = "{rationale}", **options: object
) -> list[list[Rationale]]:
    inner = MetadataWorker({"a": template, "b": f"see {template}"})
    worker = CorruptingWorker(inner, share=share, **options)  # type: ignore[arg-type]
    worker.setup(SetupContext(items=ITEMS))
    return worker.propose(ITEMS, 2, seed=seed)


def test_the_share_is_damaged_and_marked_and_the_rest_is_unchanged() -> None:
    clean = MetadataWorker({"a": "{rationale}", "b": "see {rationale}"}).propose(ITEMS, 2, seed=0)
    found = corrupted(0.3)
    marks = Counter(each.corruption for rationales in found for each in rationales)
    assert 0.25 < 1 - marks[""] / 800 < 0.35
    assert min(marks[kind] for kind in ("wrong_entity", "shuffled", "empty_talk")) > 50
    for before, after in zip(clean, found, strict=True):
        assert len(after) == len(before) == len({each.text for each in after})
        for old, new in zip(before, after, strict=True):
            assert new.worker == "corrupting"
            assert (new.text == old.text) == (not new.corruption)


@pytest.mark.parametrize(("share", "marked"), [(0.0, 0), (1.0, 800)])
def test_a_share_of_0_damages_nothing_and_a_share_of_1_everything(share: float, marked: int) -> None:
    assert sum(bool(each.corruption) for rationales in corrupted(share) for each in rationales) == marked


def test_each_kind_of_damage_does_what_its_name_says() -> None:
    texts = {item.fields["rationale"] for item in ITEMS} | {f"see {item.fields['rationale']}" for item in ITEMS}
    for item, rationales in zip(ITEMS, corrupted(1.0), strict=True):
        for each in rationales:
            if each.corruption == "wrong_entity":
                assert each.text in texts
                assert item.fields["rationale"] not in each.text
                assert item.instruction in each.text  # from an item with the same instruction
            elif each.corruption == "shuffled":
                assert sorted(each.text.replace("see ", "").replace(" see", "").split()) == sorted(
                    item.fields["rationale"].split()
                )
            else:
                assert each.text in EMPTY_TALK


def test_a_text_that_cannot_be_shuffled_gets_another_kind_of_damage() -> None:
    worker = CorruptingWorker(MetadataWorker({"a": "{short}"}), share=1.0, kinds=["shuffled", "empty_talk"])
    assert {each.corruption for rationales in worker.propose(ITEMS, 1, seed=0) for each in rationales} == {"empty_talk"}


def test_the_seed_changes_which_candidates_are_damaged() -> None:
    assert corrupted(seed=0) == corrupted(seed=0)
    assert corrupted(seed=0) != corrupted(seed=1)


def test_a_single_item_has_no_other_entity() -> None:
    worker = CorruptingWorker(MetadataWorker(), share=1.0, kinds=["wrong_entity"])
    worker.setup(SetupContext(items=ITEMS[:1]))
    assert [each.corruption for each in worker.propose(ITEMS[:1], 1, seed=0)[0]] == [""]


def test_another_picture_whose_path_ends_alike_is_another_entity() -> None:
    items = [Item("", (Image(f"/{disk}/images/0.png"),), {"seen": "x"}) for disk in ("a", "b")]

    class ByPath(MetadataWorker):
        def propose(self, items, k, *, seed):  # type: ignore[no-untyped-def]
            return [[Rationale(f"seen on {item.parts[0].source}", "by_path")] for item in items]

    worker = CorruptingWorker(ByPath(), share=1.0, kinds=["wrong_entity"])
    worker.setup(SetupContext(items=items))
    assert [each.corruption for found in worker.propose(items, 1, seed=0) for each in found] == ["wrong_entity"] * 2


def test_the_other_worker_gets_the_model_and_is_in_the_settings() -> None:
    worker = CorruptingWorker(ModelWorker())
    worker.setup(SetupContext(model=Model(FakeBackbone(seed=3), FakePooler())))
    assert worker.settings["of"]["worker"] == "model"
    assert worker.settings["of"]["model"] == "fake"


def test_report_and_release_are_those_of_the_other_worker() -> None:
    released = []

    class Costly(MetadataWorker):
        report = "three answers"

        def release(self) -> None:
            released.append(self)

    worker = CorruptingWorker(Costly())
    assert worker.report == "three answers"
    worker.release()
    assert released == [worker.worker]


def test_settings_outside_their_range_are_errors() -> None:
    with pytest.raises(ValueError, match=r"workers\.corrupting\.share is 1\.5; give a number from 0 to 1"):
        CorruptingWorker(MetadataWorker(), share=1.5)
    with pytest.raises(ValueError, match=r"unknown kinds \['wrong'\]; .*wrong_entity"):
        CorruptingWorker(MetadataWorker(), kinds=["wrong"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="kinds is empty"):
        CorruptingWorker(MetadataWorker(), kinds=[])
    with pytest.raises(ValueError, match="call setup"):
        CorruptingWorker(MetadataWorker()).propose(ITEMS, 1, seed=0)
