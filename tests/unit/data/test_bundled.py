"""The bundled data set: its content is correct and reproducible, and pictures are decoded lazily."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from importlib import resources

import pytest
from PIL.Image import Transpose

from mmemb.data import bundled
from mmemb.data.bundled import SPLITS, TASKS, evaluation_tasks, load_pairs, open_picture, pictures
from mmemb.data.bundled.entities import ATTRIBUTES, TRAINING_STYLES, VENDORS, countries, entities, scene_vocabulary
from mmemb.types import EvaluationTask, Image, Item, Text

HELD_OUT = ("control", "validation", "test")
BY_NAME = {entity.name: entity for entity in entities().values()}


@pytest.fixture(scope="module")
def retrieval() -> dict[str, dict[str, EvaluationTask]]:
    return {split: {task.name: task for task in evaluation_tasks(split)} for split in HELD_OUT}


def scene_names(item: Item) -> list[str]:
    part = item.parts[0]
    assert isinstance(part, Image)
    assert isinstance(part.source, str)
    return [entities()[key].name for key in part.source.rpartition("/")[2].split("+")]


# --- the entities


def test_files_stay_within_five_megabytes() -> None:
    folder = resources.files(bundled)
    assert sum(len((folder / name).read_bytes()) for name in ("entities.json", "pictures.zip")) <= 5_000_000


def test_both_vendors_draw_every_entity_and_further_styles_most_emoji() -> None:
    both = {f"{vendor}/{key}" for vendor in VENDORS for key in entities()}
    further = {f"{style}/{key}" for key, entity in entities().items() for style in entity.styles}
    assert set(pictures.picture_names()) == both | further
    assert {entities()[name.rpartition("/")[2]].kind for name in further} == {"emoji"}
    count = {style: sum(style in entity.styles for entity in entities().values()) for style in TRAINING_STYLES}
    assert all(few >= least for few, least in zip(count.values(), (430, 300, 190, 430, 150), strict=True)), count


def test_names_are_unique_short_and_plain() -> None:
    names = [entity.name for entity in entities().values()]
    assert len(set(names)) == len(names)
    for name in names:
        assert name == name.lower()
        assert name.isascii()
        assert 1 <= len(name.split()) <= 3


def test_data_set_is_large_enough_for_measurements() -> None:
    kinds = [entity.kind for entity in entities().values()]
    assert kinds.count("emoji") >= 450
    assert kinds.count("flag") >= 200
    assert len(scene_vocabulary()) == 80
    assert {split: len(countries(split)) for split in HELD_OUT} == {"control": 25, "validation": 20, "test": 45}


def test_at_most_one_vendor_of_an_entity_is_withheld() -> None:
    for entity in entities().values():
        assert len(entity.withheld) <= 1
        assert entity.train_vendors()


def test_scene_vocabulary_is_withheld_from_no_split() -> None:
    assert all(not entity.withheld for entity in scene_vocabulary())


def test_countries_have_every_attribute() -> None:
    assert all(set(country.attributes) == set(ATTRIBUTES) for country in countries())


# Facts that a reader checks first. The test shows when a change of sources breaks them.
@pytest.mark.parametrize(
    ("country", "currency", "language", "region"),
    [
        ("chile", "chilean peso", "spanish", "south america"),
        ("japan", "japanese yen", "japanese", "eastern asia"),
        ("croatia", "euro", "croatian", "southern europe"),
        ("lesotho", "lesotho loti", "southern sotho", "southern africa"),
    ],
)
def test_known_facts(country: str, currency: str, language: str, region: str) -> None:
    assert BY_NAME[country].attributes == {"currency": currency, "language": language, "region": region}


# --- the pictures


def test_picture_is_small_rgb_with_or_without_prefix() -> None:
    picture = open_picture("bundled:noto/1f34e")
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert picture.tobytes() == open_picture("noto/1f34e").tobytes()
    assert picture.tobytes() != open_picture("twemoji/1f34e").tobytes()


def test_scene_shows_its_cells_in_reading_order() -> None:
    keys = [entity.key for entity in scene_vocabulary()[:4]]
    scene = open_picture(f"twemoji/scene/{'+'.join(keys)}")
    assert scene.size == (128, 128)
    for cell, key in enumerate(keys):
        x, y = 64 * (cell % 2), 64 * (cell // 2)
        assert scene.crop((x, y, x + 64, y + 64)).tobytes() == open_picture(f"twemoji/{key}").tobytes()


def test_mirrored_picture_has_left_and_right_exchanged() -> None:
    picture, mirrored = open_picture("noto/1f34e"), open_picture("bundled:noto/mirrored/1f34e")
    assert mirrored.tobytes() != picture.tobytes()
    assert mirrored.transpose(Transpose.FLIP_LEFT_RIGHT).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "name",
    ["noto/ffff", "apple/1f34e", "1f34e", "", "noto/scene/1f34e+1f34e+1f34e+ffff", "noto/mirrored/ffff", "mirrored/a"],
)
def test_unknown_picture_message_names_the_styles(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"no bundled picture .*styles are noto, twemoji, fluent, emojione, fxemoji, .*$"
    ):
        open_picture(name)


def test_scene_of_three_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells; give 4"):
        open_picture("noto/scene/1f34e+1f34e+1f34e")


def _digest(name: str) -> int:
    return hash(open_picture(name).tobytes())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_forked_workers_read_the_same_pictures() -> None:
    names = [f"noto/{entity.key}" for entity in scene_vocabulary()]
    here = [_digest(name) for name in names]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_digest, names, chunksize=1) == here


def test_pairs_and_tasks_open_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(pictures, "_archive", refuse)
    assert load_pairs("train", scenes_per_task=5)
    assert evaluation_tasks("validation")
    assert bundled.PretrainingSamples()[0]


def test_importing_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, mmemb.data.bundled as b; b.load_pairs('validation'); print({'torch', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- pairs


def test_unknown_split_and_task_messages_name_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'.*train, control, validation, test"):
        load_pairs("dev")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        evaluation_tasks("dev")
    with pytest.raises(ValueError, match="unknown task 'nmae'.*name, vendor"):
        load_pairs("test", tasks=["nmae"])


@pytest.mark.parametrize("split", SPLITS)
def test_ids_are_unique(split: str) -> None:
    ids = [pair.id for pair in load_pairs(split, scenes_per_task=100)]
    assert len(set(ids)) == len(ids)


def test_more_scenes_than_exist_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"scenes_per_task: task 'findscene' has only \d+ .*'validation', but 250"):
        load_pairs("validation", tasks=["findscene"], scenes_per_task=250)


def test_only_the_chosen_tasks_are_loaded() -> None:
    assert {pair.task for pair in load_pairs("test", tasks=["left1", "name"])} == {"left1", "name"}


def test_training_scenes_depend_on_the_count_and_the_seed() -> None:
    first, same, other = (load_pairs("train", tasks=["left1"], seed=seed, scenes_per_task=50) for seed in (1, 1, 2))
    assert len(first) == 50
    assert first == same
    assert not {pair.id for pair in first} & {pair.id for pair in other}


def test_other_tasks_do_not_depend_on_the_seed() -> None:
    assert load_pairs("test", tasks=["name", "fact"], seed=1) == load_pairs("test", tasks=["name", "fact"], seed=2)


def test_two_processes_make_the_same_pairs() -> None:
    code = (
        "import hashlib; from mmemb.data.bundled import *; "
        "x = repr([load_pairs(s, scenes_per_task=20) for s in SPLITS]) + repr(evaluation_tasks('test')) + "
        "repr([PretrainingSamples(3)[i] for i in range(50)]); print(hashlib.sha256(x.encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True
        ).stdout
        for salt in ("1", "2")
    }
    assert len(runs) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_rationale_is_the_template_filled_with_the_query_fields(split: str) -> None:
    for pair in load_pairs(split, scenes_per_task=30):
        fields = pair.query.fields
        assert fields["rationale"] == TASKS[pair.task].render(fields)
        assert fields["rationale"] == fields["rationale"].lower()


def test_a_rationale_ends_with_its_text_answer() -> None:
    pairs = [pair for pair in load_pairs("test") if isinstance(pair.positive.parts[0], Text)]
    assert {pair.task for pair in pairs} == {"name", "fact", "flagattr", "left1", "flagscene"}
    for pair in pairs:
        assert pair.query.fields["rationale"].endswith(pair.positive.text)


def test_instructions_are_short() -> None:
    assert all(len(spec.instruction.split()) <= 8 for spec in TASKS.values())


def test_name_and_vendor_answers_are_of_the_same_entity() -> None:
    for pair in load_pairs("test", tasks=["name", "vendor"]):
        source = pair.query.parts[0].source  # type: ignore[union-attr]
        vendor, key = str(source).removeprefix("bundled:").split("/")
        assert pair.query.fields["name"] == entities()[key].name
        other = "twemoji" if vendor == "noto" else "noto"
        assert pair.positive_id == (f"text:{entities()[key].name}" if pair.task == "name" else f"picture:{other}/{key}")


def test_scenematch_target_is_the_other_vendors_drawing_of_the_same_arrangement() -> None:
    for pair in load_pairs("test", tasks=["scenematch"]):
        assert scene_names(pair.query) == scene_names(pair.positive)
        assert pair.query.parts != pair.positive.parts


def test_left_neighbour_is_left_in_the_same_row() -> None:
    for pair in load_pairs("test", tasks=["left1"]):
        names = scene_names(pair.query)
        right = names.index(pair.query.fields["anchor"])
        assert right in (1, 3)
        assert pair.positive.text == names[right - 1]
        assert pair.query.fields["anchor"] in pair.query.text


def test_flag_scene_has_one_flag_left_of_its_anchor() -> None:
    for pair in load_pairs("test", tasks=["flagscene"]):
        names = scene_names(pair.query)
        flags = [name for name in names if BY_NAME[name].kind == "flag"]
        assert flags == [pair.query.fields["country"]]
        right = names.index(pair.query.fields["anchor"])
        assert right in (1, 3)
        assert names[right - 1] == flags[0]
        assert pair.positive.text == BY_NAME[flags[0]].attributes[pair.query.fields["attribute"]]
        assert pair.query.fields["attribute"] in pair.query.text


# --- evaluation tasks


@pytest.mark.parametrize("split", HELD_OUT)
def test_candidates_are_unique_and_include_every_positive(
    split: str, retrieval: dict[str, dict[str, EvaluationTask]]
) -> None:
    assert list(retrieval[split]) == list(TASKS)
    for task in retrieval[split].values():
        assert len(set(task.candidate_ids)) == len(task.candidates) == len(task.candidate_ids)
        content = dict(zip(task.candidate_ids, task.candidates, strict=True))
        assert len({repr(item.parts) for item in task.candidates}) == len(task.candidates)
        for pair in task.queries:
            assert content[pair.positive_id] == pair.positive


def test_test_split_has_enough_queries_and_candidates(retrieval: dict[str, dict[str, EvaluationTask]]) -> None:
    for task in retrieval["test"].values():
        assert len(task.queries) == 150
        assert 150 <= len(task.candidates) <= 200
    for task in retrieval["validation"].values():
        assert len(task.queries) == 60


def test_no_query_is_its_own_candidate(retrieval: dict[str, dict[str, EvaluationTask]]) -> None:
    for tasks in retrieval.values():
        for name in ("vendor", "scenematch"):
            shown = {pair.query.parts for pair in tasks[name].queries}
            assert not shown & {item.parts for item in tasks[name].candidates}


def test_only_one_candidate_of_findscene_shows_both_things(retrieval: dict[str, dict[str, EvaluationTask]]) -> None:
    for tasks in retrieval.values():
        task = tasks["findscene"]
        scenes = {key: set(scene_names(item)) for key, item in zip(task.candidate_ids, task.candidates, strict=True)}
        for pair in task.queries:
            wanted = {pair.query.fields["first"], pair.query.fields["second"]}
            assert [key for key, names in scenes.items() if wanted <= names] == [pair.positive_id]


@pytest.mark.parametrize("name", ["scenematch", "findscene"])
def test_scene_candidates_include_near_misses(name: str, retrieval: dict[str, dict[str, EvaluationTask]]) -> None:
    task = retrieval["test"][name]
    near = [item for key, item in zip(task.candidate_ids, task.candidates, strict=True)][len(task.queries) :]
    assert len(near) == 50
    for item in near:
        names = scene_names(item)
        closest = max(
            sum(a == b for a, b in zip(names, scene_names(pair.positive), strict=True)) for pair in task.queries
        )
        # Swapping two cells leaves two in place. Replacing one leaves three.
        assert closest in ((2, 3) if name == "scenematch" else (3,))


def test_retrieval_on_train_has_as_many_scenes_as_control() -> None:
    (task,) = evaluation_tasks("train", tasks=["left1"])
    assert len(task.queries) == 300
