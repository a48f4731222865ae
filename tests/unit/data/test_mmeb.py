import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from mmemb.data.mmeb import place_pictures, train_task
from mmemb.data.pairs import read_pairs, read_tasks
from mmemb.data.rows import FieldError
from mmemb.data.sources import Source
from mmemb.types import Image, Item, Text

CAT, DOG = Image("/cat.png"), Image("/dog.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("cat", "dog", "tree"):
        PILImage.new("RGB", (2, 2)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def picture(folder: Path, name: str) -> Image:
    return Image(str(folder / "images" / f"{name}.png"))


def train_row(**changes: Any) -> dict[str, Any]:
    row = {
        "qry": "<|image_1|>\nRepresent the image.\n",
        "qry_image_path": "images/cat.png",
        "pos_text": "cat",
        "pos_image_path": "",
    }
    return {**row, **changes}


def evaluation_row(**changes: Any) -> dict[str, Any]:
    row = {
        "qry_inst": "<|image_1|> Identify the animal.",
        "qry_text": "Which one?",
        "qry_img_path": "images/cat.png",
        "tgt_inst": "Represent the text.",
        "tgt_text": ["cat", "dog", "tree"],
        "tgt_img_path": ["", "", ""],
    }
    return {**row, **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return Source(str(path))


@pytest.mark.parametrize(
    ("text", "pictures", "parts"),
    [
        ("<|image_1|>\nSay it.\n", [CAT], (CAT, Text("Say it."))),
        ("Before <|image_1|> after", [CAT], (Text("Before"), CAT, Text("after"))),
        ("No mark", [CAT], (CAT, Text("No mark"))),
        ("No mark", [], (Text("No mark"),)),
        ("", [CAT], (CAT,)),
        ("<|image_2|> then <|image_1|>", [CAT, DOG], (DOG, Text("then"), CAT)),
        ("see <|image_2|>", [CAT, DOG], (CAT, Text("see"), DOG)),
        (" \n", [], ()),
    ],
)
def test_pictures_take_the_places_of_their_marks(text: str, pictures: list[Any], parts: tuple[Any, ...]) -> None:
    assert place_pictures(text, pictures, field="f") == parts


def test_a_mark_without_a_picture_is_an_error() -> None:
    with pytest.raises(FieldError, match=r"field 'qry': has the mark <\|image_2\|>, but 1 picture"):
        place_pictures("<|image_2|>", [CAT], field="qry")


def test_a_training_row_becomes_a_pair(folder: Path) -> None:
    (pair,) = read_pairs(write(folder / "animals.jsonl", [train_row()]))
    assert pair.query == Item("", (picture(folder, "cat"), Text("Represent the image.")))
    assert pair.positive == Item("", (Text("cat"),))
    assert (pair.id, pair.task, pair.positive_id) == ("animals/animals:1", "animals", "text:cat")
    assert pair.hard_negatives == ()


def test_pictures_are_targets_and_hard_negatives_too(folder: Path) -> None:
    row = train_row(
        pos_text="<|image_1|> a dog", pos_image_path="images/dog.png", neg_text="", neg_image_path="images/tree.png"
    )
    (pair,) = read_pairs(write(folder / "a.jsonl", [row]))
    assert pair.positive.parts == (picture(folder, "dog"), Text("a dog"))
    assert pair.positive_id.startswith("blake2:")
    assert pair.hard_negatives == (Item("", (picture(folder, "tree"),)),)
    assert pair.hard_negative_ids == (f"image:{folder}/images/tree.png",)


def test_empty_negative_columns_are_no_negative(folder: Path) -> None:
    (pair,) = read_pairs(write(folder / "a.jsonl", [train_row(neg_text="", neg_image_path=None)]))
    assert pair.hard_negatives == ()


def test_parquet_as_on_the_hub_with_an_image_root(folder: Path) -> None:
    (folder / "ImageNet_1K").mkdir()
    path = folder / "ImageNet_1K" / "original-00000-of-00001.parquet"
    rows = [train_row(pos_text="[0.1, 0.5]"), train_row(pos_text="{}")]
    pq.write_table(pa.Table.from_pylist(rows), path)
    pairs = read_pairs(Source(str(path), image_root=str(folder)))
    assert [pair.task for pair in pairs] == ["ImageNet_1K", "ImageNet_1K"]
    assert [pair.positive.text for pair in pairs] == ["[0.1, 0.5]", "{}"]


def test_the_task_is_the_folder_only_if_the_file_is_named_after_a_split() -> None:
    assert train_task(Path("x/CIRR/diverse_instruction-00000-of-00001.parquet")) == "CIRR"
    assert train_task(Path("x/CIRR/test.parquet")) == "CIRR"
    assert train_task(Path("x/CIRR/training.parquet")) == "training"
    assert train_task(Path("train.jsonl")) == "train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qry": "", "qry_image_path": ""}, "line 1, field 'qry': is empty, and so is qry_image_path"),
        ({"pos_text": None, "pos_image_path": ""}, "line 1, field 'pos_text': is empty, and so is pos_image_path"),
        ({"qry": 3}, "line 1, field 'qry': expected a text, got the int 3"),
        ({"qry_image_path": ""}, r"line 1, field 'qry': has the mark <\|image_1\|>, but 0 picture"),
        ({"qry_image_path": "images/cow.png"}, "line 1, field 'qry_image_path': image 'images/cow.png' does not exist"),
        ({"qry_image_path": "../cat.png"}, "line 1, field 'qry_image_path': .* outside its root"),
    ],
)
def test_an_invalid_training_row_names_file_line_and_field(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"rows\.jsonl, " + message) as caught:
        read_pairs(write(folder / "rows.jsonl", [train_row(**changes)]))
    assert "\n" not in str(caught.value)


def test_evaluation_rows_become_a_task_with_the_ground_truth_first(folder: Path) -> None:
    other = evaluation_row(tgt_text=["tree", "cat", "bird"], qry_img_path="images/tree.png")
    (task,) = read_tasks(write(folder / "Animals.json", [evaluation_row(), other]))
    assert task.name == "Animals"
    first, second = task.queries
    assert first.query == Item("Identify the animal.", (picture(folder, "cat"), Text("Which one?")))
    assert first.positive == Item("Represent the text.", (Text("cat"),))
    assert (first.positive_id, first.hard_negative_ids) == ("text:cat", ("text:dog", "text:tree"))
    assert (second.positive_id, second.hard_negative_ids) == ("text:tree", ("text:cat", "text:bird"))
    assert first.ranked_alone
    assert second.ranked_alone
    assert sorted(task.candidate_ids) == ["text:bird", "text:cat", "text:dog", "text:tree"]
    assert [f"text:{candidate.text}" for candidate in task.candidates] == list(task.candidate_ids)


def test_queries_share_their_candidates_as_objects(folder: Path) -> None:
    first, second = read_pairs(write(folder / "a.json", [evaluation_row(), evaluation_row()]))
    assert first.positive is second.positive
    assert first.hard_negatives[1] is second.hard_negatives[1]


def test_picture_candidates_differ_by_path_and_caption(folder: Path) -> None:
    paths = ["images/cat.png", "images/dog.png", "images/dog.png", "images/dog.png"]
    (task,) = read_tasks(write(folder / "a.json", [evaluation_row(tgt_text=["", "", "a dog", ""], tgt_img_path=paths)]))
    assert len(task.candidates) == 3
    assert task.queries[0].positive.parts == (picture(folder, "cat"),)


def test_the_older_rows_have_no_instructions(folder: Path) -> None:
    row = {key: value for key, value in evaluation_row().items() if not key.endswith("_inst")}
    (task,) = read_tasks(write(folder / "a.json", [row]))
    assert task.queries[0].query.instruction == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tgt_text": []}, "field 'tgt_text': expected a non-empty list with the ground truth first"),
        ({"tgt_text": "cat"}, "field 'tgt_text': expected a non-empty list .*, got a text"),
        ({"tgt_img_path": [""]}, "field 'tgt_img_path': has 1 entries, but tgt_text has 3"),
        ({"tgt_text": ["cat", 4, ""]}, "field 'tgt_text': expected a text, got the int 4"),
        ({"tgt_text": ["cat", "dog", ""]}, "field 'tgt_text': is empty, and so is tgt_img_path"),
    ],
)
def test_an_invalid_evaluation_row_names_its_field(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="row 1, " + message):
        read_tasks(write(folder / "rows.json", [evaluation_row(**changes)]))
