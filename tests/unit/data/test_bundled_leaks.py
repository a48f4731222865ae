"""No split of the bundled data leaks held-out content of another split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from mmemb.data.bundled import (
    DESCRIBE,
    SPLITS,
    PretrainingSamples,
    evaluation_tasks,
    is_right,
    load_pairs,
    probe_samples,
)
from mmemb.data.bundled.entities import TRAINING_STYLES, countries, entities
from mmemb.data.bundled.pretraining import SIZE, WEIGHTS, all_texts
from mmemb.data.bundled.tasks import FIND_PHRASINGS
from mmemb.data.pairs import read_pairs
from mmemb.data.sources import Source
from mmemb.types import Image, Item, Pair

HELD_OUT = ("control", "validation", "test")
BY_NAME = {entity.name: entity for entity in entities().values()}
SAMPLES = 6000


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair]]:
    return {split: load_pairs(split) for split in SPLITS}


@pytest.fixture(scope="module")
def pretraining() -> list[Pair]:
    samples = PretrainingSamples(5)
    return [samples[i] for i in range(SAMPLES)]


def sources(items: Iterable[Item]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (vendor, keys) of every picture: one key, or the four keys of a scene."""
    for item in items:
        for part in item.parts:
            if isinstance(part, Image):
                assert isinstance(part.source, str)
                vendor, _, rest = part.source.removeprefix("bundled:").partition("/")
                yield vendor, tuple(rest.removeprefix("scene/").removeprefix("mirrored/").split("+"))


def sides(found: Iterable[Pair]) -> Iterator[Item]:
    for pair in found:
        yield from (pair.query, pair.positive)


def scenes(items: Iterable[Item]) -> set[frozenset[str]]:
    return {frozenset(keys) for _, keys in sources(items) if len(keys) == 4}


def compositions(pair: Pair) -> frozenset[str]:
    """Returns the scene of a pair's picture, or of the caption in its text, if there is one."""
    if pair.task == "text_scene":
        by_name = {entity.name: key for key, entity in entities().items()}
        return frozenset(by_name[name] for name in pair.query.text.split(" , "))
    return next(iter(scenes([pair.query, pair.positive])), frozenset())


def test_no_query_occurs_in_two_splits(pairs: dict[str, list[Pair]], pretraining: list[Pair]) -> None:
    rendered = {
        split: {(pair.query.instruction, pair.query.parts) for pair in found}
        for split, found in (pairs | {"pretraining": pretraining}).items()
    }
    for split in HELD_OUT:
        for other in rendered.keys() - {split}:
            assert not rendered[split] & rendered[other], (split, other)


def test_picture_of_a_held_out_name_is_never_shown_in_training(
    pairs: dict[str, list[Pair]], pretraining: list[Pair]
) -> None:
    withheld = {(vendor, key) for key, entity in entities().items() for vendor in entity.withheld}
    assert len(withheld) == 300
    for found in (pairs["train"], pretraining):
        shown = {(vendor, key) for vendor, keys in sources(sides(found)) for key in keys}
        assert len(shown) > 500
        assert not shown & withheld


def test_further_styles_are_shown_in_training_only(pairs: dict[str, list[Pair]], pretraining: list[Pair]) -> None:
    for found in (pairs["train"], pretraining):
        assert set(TRAINING_STYLES) <= {style for style, _ in sources(sides(found))}
    for split in HELD_OUT:
        candidates = [item for task in evaluation_tasks(split) for item in task.candidates]
        assert not set(TRAINING_STYLES) & {style for style, _ in sources([*sides(pairs[split]), *candidates])}


def test_withheld_picture_is_shown_by_its_own_split_only(pairs: dict[str, list[Pair]]) -> None:
    for split in HELD_OUT:
        candidates = [item for task in evaluation_tasks(split) for item in task.candidates]
        for vendor, keys in sources([*sides(pairs[split]), *candidates]):
            for key in keys:
                assert entities()[key].withheld.get(vendor, split) == split


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_scene_is_in_no_other_split_even_rearranged(
    split: str, pairs: dict[str, list[Pair]], pretraining: list[Pair]
) -> None:
    candidates = [item for task in evaluation_tasks(split) for item in task.candidates]
    mine = scenes([*sides(pairs[split]), *candidates])
    assert len(mine) > 200
    for other in set(SPLITS) - {split}:
        assert not mine & scenes(sides(pairs[other]))
    assert not mine & {compositions(pair) for pair in pretraining}


def test_text_scenes_of_pretraining_are_training_scenes(pretraining: list[Pair], pairs: dict[str, list[Pair]]) -> None:
    text = [pair for pair in pretraining if pair.task == "text_scene"]
    assert len(text) > 300
    held = set().union(*(scenes(sides(pairs[split])) for split in HELD_OUT))
    assert not {compositions(pair) for pair in text} & held


def test_flag_questions_are_split_by_country(pairs: dict[str, list[Pair]]) -> None:
    split_of = {country.name: country.split for country in countries()}
    for split in SPLITS:
        asked = {pair.query.fields["country"] for pair in pairs[split] if pair.task in ("flagattr", "flagscene")}
        assert asked
        assert {split_of[name] for name in asked} == {split}


def test_every_country_of_the_test_split_has_a_query(pairs: dict[str, list[Pair]]) -> None:
    asked = {pair.query.fields["country"] for pair in pairs["test"] if pair.task == "flagattr"}
    assert len(asked) >= 40


def test_pretraining_asks_for_no_composition_in_a_picture(pretraining: list[Pair]) -> None:
    names = {entity.name for entity in entities().values()}
    for pair in pretraining:
        if any(isinstance(part, Image) for part in pair.query.parts):
            said = pair.positive.text.split(" , ")
            assert pair.query.instruction == DESCRIBE
            assert set(said) <= names
            asked = {phrasing.format(name=said[-1]) for phrasing in FIND_PHRASINGS} if pair.task == "find" else {""}
            assert pair.query.text in asked


def test_training_asks_for_every_fact_in_its_own_phrasings(pairs: dict[str, list[Pair]]) -> None:
    def asked(split: str) -> set[tuple[str, str]]:
        facts = [pair.query.fields for pair in load_pairs(split, tasks=["fact"])]
        return {(fields["country"], fields["attribute"]) for fields in facts}

    assert len(asked("train")) == 3 * len(countries())
    for split in HELD_OUT:
        assert asked(split) <= asked("train")


def test_every_answer_of_the_test_split_is_an_answer_of_training(pairs: dict[str, list[Pair]]) -> None:
    known = {pair.positive_id for pair in pairs["train"] if pair.task == "fact"}
    wanted = {pair.positive_id for pair in pairs["test"] if pair.task in ("flagattr", "flagscene", "fact")}
    assert wanted <= known


def test_findscene_pairs_of_words_are_disjoint(pairs: dict[str, list[Pair]]) -> None:
    def words(split: str) -> set[frozenset[str]]:
        return {
            frozenset((pair.query.fields["first"], pair.query.fields["second"]))
            for pair in pairs[split]
            if pair.task == "findscene"
        }

    for split in HELD_OUT:
        for other in set(SPLITS) - {split}:
            assert not words(split) & words(other)


# --- pretraining samples and probes


def test_sample_is_a_function_of_seed_and_index(pretraining: list[Pair]) -> None:
    again, other = PretrainingSamples(5), PretrainingSamples(6)
    assert [again[i] for i in (17, 3, 4999)] == [pretraining[i] for i in (17, 3, 4999)]
    assert [other[i] for i in range(20)] != pretraining[:20]


def test_a_sample_beyond_the_length_is_an_index_error() -> None:
    samples = PretrainingSamples()
    assert samples[len(samples) - 1].positive.text
    for index in (SIZE, -1):
        with pytest.raises(IndexError):
            samples[index]


def test_only_the_named_tasks_are_drawn() -> None:
    samples = read_pairs(Source("bundled:pretrain", tasks=["fact", "find"]))
    assert {samples[i].task for i in range(100)} == {"fact", "find"}
    thrice = read_pairs(Source("bundled:pretrain", tasks=["picture", "text_scene", "text_scene", "text_scene"]))
    share = sum(thrice[i].task == "text_scene" for i in range(1000)) / 1000
    assert abs(share - 3 * WEIGHTS["text_scene"] / (WEIGHTS["picture"] + 3 * WEIGHTS["text_scene"])) < 0.06
    with pytest.raises(ValueError, match="got name, fact; choose from picture, scene, fact, text_scene, find"):
        read_pairs(Source("bundled:pretrain", tasks=["name", "fact"]))
    with pytest.raises(ValueError, match="got none"):
        PretrainingSamples(tasks=[])


def test_the_first_stage_shows_every_training_picture() -> None:
    first = PretrainingSamples(5, tasks=["picture", "scene", "fact", "text_scene"])
    shown = {(vendor, key) for vendor, keys in sources(first[i].query for i in range(2 * SAMPLES)) for key in keys}
    wanted = {(style, key) for key, entity in entities().items() for style in entity.train_styles()}
    assert len(wanted - shown) < 0.2 * len(wanted)


def test_pretraining_mirrors_half_of_the_emoji_and_no_flag(pretraining: list[Pair]) -> None:
    found: dict[str, list[bool]] = {"emoji": [], "flag": []}
    for pair in pretraining:
        if pair.task == "picture":
            (part,) = pair.query.parts
            assert isinstance(part, Image)
            found[BY_NAME[pair.positive.text].kind].append("/mirrored/" in str(part.source))
    assert 0.4 < sum(found["emoji"]) / len(found["emoji"]) < 0.6
    assert found["flag"]
    assert not any(found["flag"])


def test_text_scene_answers_are_neighbours_in_their_row(pretraining: list[Pair]) -> None:
    for pair in pretraining:
        if pair.task == "text_scene":
            caption, *said = pair.positive.text.split(" ; ")
            assert caption == pair.query.text
            (a, b), (c, d) = (caption.split(" , ")[row : row + 2] for row in (0, 2))
            true = {
                f"{side} of {x} : {y}" for x, y in ((a, b), (c, d)) for side, x, y in (("right", x, y), ("left", y, x))
            }
            assert len(set(said)) == 2
            assert set(said) <= true


@pytest.mark.parametrize(
    ("task", "given", "right"),
    [
        ("scene", "a , b , c , d", True),
        ("scene", "a , b , c", False),
        ("text_scene", "a , b , c , d ; left of b : a", True),
        ("text_scene", "a , b , c , d ; right of c : d ; left of d : c", True),
        ("text_scene", "a , b , c , d ; left of d : a", False),
        ("text_scene", "a , b , c , d", False),
        ("text_scene", "a , b , d , c ; left of b : a", False),
    ],
)
def test_right_answers_to_a_probe(task: str, given: str, right: bool) -> None:
    response = "a , b , c , d" if task == "scene" else "a , b , c , d ; right of a : b ; left of d : c"
    assert is_right(task, response, given) is right


def test_reversed_facts_have_one_answer(pretraining: list[Pair]) -> None:
    found = [pair for pair in pretraining if pair.query.text.startswith("which country has the")]
    assert found
    for pair in found:
        rest = pair.query.text.removeprefix("which country has the ").removesuffix(" ?")
        attribute, _, value = rest.partition(" ")
        assert [c.name for c in countries() if c.attributes[attribute] == value] == [pair.positive.text]


def test_probes_are_not_part_of_pretraining(pretraining: list[Pair]) -> None:
    probes = probe_samples("test")
    kinds = [pair.task for pair in probes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "picture": 150,
        "fact": 150,
        "scene": 150,
        "text_scene": 150,
        "find": 150,
    }
    seen = {(pair.query.instruction, pair.query.parts) for pair in pretraining}
    assert not seen & {(pair.query.instruction, pair.query.parts) for pair in probes}
    prompts = {pair.query.instruction for pair in pretraining}
    assert {pair.query.instruction for pair in probes} <= prompts


def test_known_texts_cover_every_word(pairs: dict[str, list[Pair]], pretraining: list[Pair]) -> None:
    known = {word for text in all_texts() for word in text.split()}
    for pair in [*pairs["train"], *pairs["test"], *pretraining]:
        for item in (pair.query, pair.positive):
            assert set(f"{item.instruction} {item.text} {item.fields.get('rationale', '')}".split()) <= known
