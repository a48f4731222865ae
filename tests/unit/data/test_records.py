import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from mmemb.data.items import content_identity, read_items
from mmemb.data.pairs import read_pairs, read_tasks
from mmemb.data.sources import Source
from mmemb.types import Image, Item, Page, Pair, Text, Video

ROW = {"query": "a place to sit", "positive": "chair"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.jpg"):
        PILImage.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, **options: Any) -> list[Pair]:
    return list(read_pairs(Source(write(folder / "rows.jsonl", *rows), **options)))


def test_the_shortest_row_is_two_texts(folder: Path) -> None:
    (pair,) = read(folder, ROW)
    assert pair == Pair(
        id="rows/rows:1",
        task="rows",
        query=Item("", (Text("a place to sit"),)),
        positive=Item("", (Text("chair"),)),
        positive_id="text:chair",
    )


def test_a_full_row_is_read_field_by_field(folder: Path) -> None:
    row = {
        "id": 7,
        "task": "find",
        "query": {"instruction": "Find it:", "text": "red", "image": "a.png", "fields": {"colour": "red", "size": 3}},
        "positive": {"parts": [{"text": "one"}, {"image": "b.png"}, {"page": "a.png"}, {"video": ["a.png", "b.png"]}]},
        "positive_id": "p1",
        "hard_negatives": ["blue", {"image": "sub/c.jpg"}],
        "note": "columns of one's own are let be",
    }
    (pair,) = read(folder, row)
    a, b = str(folder / "a.png"), str(folder / "b.png")
    assert (pair.id, pair.task, pair.positive_id) == ("7", "find", "p1")
    assert pair.query == Item("Find it:", (Image(a), Text("red")), {"colour": "red", "size": "3"})
    assert pair.positive.parts == (Text("one"), Image(b), Page(a), Video((a, b)))
    assert pair.hard_negatives == (Item("", (Text("blue"),)), Item("", (Image(str(folder / "sub" / "c.jpg")),)))
    assert pair.hard_negative_ids == ("text:blue", f"image:{folder}/sub/c.jpg")


def test_a_mark_in_the_text_places_the_picture(folder: Path) -> None:
    (pair,) = read(folder, {"query": {"text": "is <|image_1|> red?", "image": "a.png"}, "positive": "yes"})
    assert pair.query.parts == (Text("is"), Image(str(folder / "a.png")), Text("red?"))


def test_pictures_are_not_opened(folder: Path) -> None:
    (folder / "notes.png").write_text("not a picture")
    assert read(folder, {"query": {"image": "notes.png"}, "positive": "x"})


def test_image_root_replaces_the_folder_of_the_file(folder: Path) -> None:
    (pair,) = read(folder, {"query": {"image": "c.jpg"}, "positive": "x"}, image_root=str(folder / "sub"))
    assert pair.query.parts == (Image(str(folder / "sub" / "c.jpg")),)


def test_blank_lines_are_skipped_but_counted_and_a_byte_order_mark_is_skipped(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n", encoding="utf-8")
    assert [pair.id for pair in read_pairs(Source(str(path)))] == ["rows/rows:1", "rows/rows:3"]


def test_json_and_parquet_give_the_same_rows(folder: Path) -> None:
    rows = [
        {
            "task": None,
            "query": {"text": "q", "image": "a.png"},
            "positive": {"text": "p"},
            "hard_negatives": [{"text": "n"}],
        },
        {"query": {"text": "q2"}, "positive": {"text": "{}"}, "hard_negatives": None, "task": "t"},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    texts = [
        {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()}
        for row in rows
    ]
    texts[0]["positive"] = "p"
    (folder / "text").mkdir()
    pq.write_table(pa.Table.from_pylist(texts), folder / "text" / "rows.parquet")
    expected = list(read_pairs(Source(write(folder / "rows.jsonl", *rows))))
    assert list(read_pairs(Source(str(folder / "rows.json")))) == expected
    assert list(read_pairs(Source(str(folder / "rows.parquet")))) == expected
    assert list(read_pairs(Source(str(folder / "text" / "rows.parquet"), image_root=str(folder)))) == expected


def test_lists_of_json_texts_in_parquet_are_items(folder: Path) -> None:
    row = {**ROW, "hard_negatives": ['{"text": "n1"}', "n2", "[3]"]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
    (pair,) = read_pairs(Source(str(folder / "rows.parquet")))
    assert [item.text for item in pair.hard_negatives] == ["n1", "n2", "[3]"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"positive": "x"}, "field 'query': is missing; every row needs a query and a positive; the row has positive"),
        ({"query": "x"}, "field 'positive': is missing"),
        ({"query": "x", "positve": "y"}, "field 'positive': is missing; .* rename 'positve'"),
        ({**ROW, "hard_negative": ["x"]}, "field 'hard_negative': is unknown; did you mean 'hard_negatives'?"),
        ({**ROW, "query": 3}, "field 'query': expected a text or an object .*, got the int 3"),
        ({**ROW, "query": {"txt": "x"}}, "field 'query.txt': is unknown; an item may have .*; did you mean 'text'?"),
        ({**ROW, "query": {}}, "field 'query': is empty"),
        ({**ROW, "query": " "}, "field 'query': is empty"),
        ({**ROW, "query": {"parts": [{"text": "  "}]}}, "field 'query': is empty"),
        ({**ROW, "query": "ab\ud800"}, r"field 'query\.text': has half a character, '\\ud800', at position 3; write"),
        ({**ROW, "query": {"parts": [{"text": "\udc00"}]}}, r"field 'query\.parts\[0\]\.text': has half a character"),
        ({**ROW, "query": {"text": "x", "fields": {"a": "\ud800"}}}, r"field 'query\.fields\.a': has half a character"),
        ({**ROW, "id": "\ud800"}, "field 'id': has half a character"),
        (
            {"qry": "x", "qry_image_path": "", "pos_text": "\ud800", "pos_image_path": ""},
            "field 'pos_text': has half a character",
        ),
        ({**ROW, "query": {"text": ["x"]}}, "field 'query.text': expected a text, got a list"),
        ({**ROW, "query": {"text": "x", "instruction": 1}}, "field 'query.instruction': expected a text"),
        ({**ROW, "query": {"text": "x", "parts": []}}, "field 'query.text': .*together with parts"),
        ({**ROW, "query": {"parts": {}}}, "field 'query.parts': expected a list of parts, got an object"),
        ({**ROW, "query": {"parts": []}}, "field 'query': is empty"),
        (
            {**ROW, "query": {"parts": ["x"]}},
            r"field 'query.parts\[0\]': expected an object with one of .*, got a text",
        ),
        (
            {**ROW, "query": {"parts": [{"text": "x", "image": "a.png"}]}},
            r"field 'query.parts\[0\]': .* got text, image",
        ),
        ({**ROW, "query": {"parts": [{"text": "x"}, {"sound": "y"}]}}, r"field 'query.parts\[1\]': .* got sound"),
        ({**ROW, "query": {"parts": [{"image": "x.png"}]}}, r"field 'query.parts\[0\].image': image 'x.png' does not"),
        ({**ROW, "query": {"image": ""}}, "field 'query.image': expected the path of a picture, got an empty text"),
        ({**ROW, "query": {"image": 5}}, "field 'query.image': expected the path of a picture, got the int 5"),
        ({**ROW, "query": {"image": "../a.png"}}, "field 'query.image': image '../a.png' is outside its root"),
        ({**ROW, "query": {"image": "gone.png"}}, "field 'query.image': image 'gone.png' does not exist"),
        ({**ROW, "query": {"video": []}}, "field 'query.video': expected a non-empty list of frame pictures"),
        ({**ROW, "query": {"video": ["a.png", "x.png"]}}, r"field 'query.video\[1\]': image 'x.png' does not exist"),
        ({**ROW, "query": {"text": "x", "fields": []}}, "field 'query.fields': expected an object"),
        ({**ROW, "query": {"text": "x", "fields": {"a": []}}}, "field 'query.fields.a': expected a text or a number"),
        ({**ROW, "hard_negatives": "x"}, "field 'hard_negatives': expected a list of items, got a text"),
        ({**ROW, "hard_negatives": [None]}, r"field 'hard_negatives\[0\]': expected .* got nothing"),
        ({**ROW, "id": True}, "field 'id': expected a text, got a truth value"),
        ({**ROW, "positive_id": []}, "field 'positive_id': expected a text, got a list"),
        ({**ROW, "task": 1}, "field 'task': expected a text"),
        ([1], "expected an object with fields, got a list"),
    ],
)
def test_an_invalid_row_names_file_line_and_field(folder: Path, row: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"rows\.jsonl, line 2[,:] " + message) as caught:
        read(folder, ROW, row)
    assert "\n" not in str(caught.value)


def test_a_missing_picture_is_a_missing_file(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(folder, {**ROW, "query": {"image": "gone.png"}})


def test_ids_must_be_unique(folder: Path) -> None:
    with pytest.raises(ValueError, match="line 3, field 'id': 'x' is already in row 1"):
        read(folder, {**ROW, "id": "x"}, ROW, {**ROW, "id": "x"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"query": "x"\n', r"a\.jsonl, line 1: is not valid JSON .* one JSON object per line"),
        ("a.jsonl", b"", r"a\.jsonl: has no rows"),
        ("a.jsonl", b'{"query": "\xff"}\n', r"a\.jsonl: is not UTF-8 text"),
        ("a.jsonl", b'{"query":' * 5000, r"a\.jsonl, line 1: is nested too deeply"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: is nested too deeply"),
        (
            "a.jsonl",
            b'{"id": ' + b"7" * 5000 + b"}",
            r"a\.jsonl, line 1: has a number with too many digits; write it as",
        ),
        ("a.json", b'{"query":' * 5000, r"a\.json: is nested too deeply"),
        ("a.json", b'[{"id": ' + b"7" * 5000 + b"}]", r"a\.json: has a number with too many digits; write it as"),
        ("a.json", b'[{"query": "\xff"}]', r"a\.json: is not UTF-8 text"),
        ("a.json", b"[{]", r"a\.json: is not valid JSON .* line 1"),
        ("a.json", b'{"query": "x"}', r"a\.json: expected a list of objects, got an object"),
        ("a.json", b"[]", r"a\.json: has no rows"),
        ("a.parquet", b"PAR?", r"a\.parquet: not a readable Parquet file"),
        ("a.csv", b"", r"a\.csv: has the unknown suffix '.csv'; data files end in \.jsonl"),
    ],
)
def test_an_invalid_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(Source(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: there is no such file"):
        read_pairs(Source(str(tmp_path / "gone.jsonl")))


TASK_ROWS = [{**ROW, "task": task} for task in ("x", "y", "x", "x", "y")]


def test_tasks_and_limit_choose_rows(folder: Path) -> None:
    assert [pair.task for pair in read(folder, *TASK_ROWS, tasks=["y"])] == ["y", "y"]
    assert [pair.task for pair in read(folder, *TASK_ROWS, limit=2)] == ["x", "y", "x", "y"]


def test_an_unknown_task_is_named_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: has no task 'z'; its tasks: x, y"):
        read(folder, *TASK_ROWS, tasks=["z"])


def test_the_source_names_the_task_of_rows_without_one(folder: Path) -> None:
    assert [pair.task for pair in read(folder, ROW, {**ROW, "task": "own"}, task="given")] == ["given", "own"]


def test_identity_follows_the_content_not_the_instruction() -> None:
    text, image, page = Text("x"), Image("/x.png"), Page("/x.png")
    picture = PILImage.new("RGB", (2, 2), "red")
    assert content_identity(Item("a", (text,))) == content_identity(Item("b", (text,))) == "text:x"
    assert content_identity(Item("", (image,))) == content_identity(Item("", (page,))) == "image:/x.png"
    several = [
        (text, image),
        (image, text),
        (text, text),
        (Text("xx"),),
        (Video(("/x.png", "/y.png")),),
        (Video(("/x.png",)),),
        (Image(picture),),
        (Image(PILImage.new("RGB", (2, 2), "blue")),),
    ]
    identities = [content_identity(Item("", parts)) for parts in several]
    assert len(set(identities)) == len(several)
    assert identities == [content_identity(Item("other", parts)) for parts in several]


def test_a_pair_file_gives_a_retrieval_task_per_task(folder: Path) -> None:
    rows = [
        {"query": "q1", "positive": "a", "hard_negatives": ["b", "n"], "task": "t"},
        {"query": "q2", "positive": "b", "task": "t"},
        {"query": "q3", "positive": "a", "task": "t"},
        {"query": "q4", "positive": "z", "task": "u"},
    ]
    tasks = read_tasks(Source(write(folder / "rows.jsonl", *rows)))
    assert [(task.name, len(task.queries), list(task.candidate_ids)) for task in tasks] == [
        ("t", 3, ["text:a", "text:b", "text:n"]),
        ("u", 1, ["text:z"]),
    ]
    assert [item.text for item in tasks[0].candidates] == ["a", "b", "n"]


def test_bundled_pairs_depend_on_tasks_limit_and_seed() -> None:
    pairs = read_pairs(Source("bundled:control", tasks=["fact", "left1"], limit=3))
    assert [pair.task for pair in pairs] == ["fact"] * 3 + ["left1"] * 3
    other = read_pairs(Source("bundled:control", tasks=["fact", "left1"], limit=3), seed=1)
    assert other[:3] == pairs[:3]
    assert other[3:] != pairs[3:]


def test_a_limit_shortens_bundled_queries_not_candidates() -> None:
    (whole,) = read_tasks(Source("bundled:validation", tasks=["fact"]))
    (short,) = read_tasks(Source("bundled:validation", tasks=["fact"], limit=2))
    assert list(short.queries) == list(whole.queries[:2])
    assert short.candidate_ids == whole.candidate_ids


def test_bundled_pretraining_samples_are_not_listed() -> None:
    pairs = read_pairs(Source("bundled:pretrain"), seed=2)
    assert len(pairs) > 10**6
    assert pairs[len(pairs) - 1] == read_pairs(Source("bundled:pretrain"), seed=2)[len(pairs) - 1]


@pytest.mark.parametrize("read", [read_pairs, read_tasks])
def test_unknown_bundled_names_are_named_with_the_valid_ones(read: Callable[[Source], Any]) -> None:
    with pytest.raises(ValueError, match="'trian' .*train, control, validation, test"):
        read(Source("bundled:trian"))
    with pytest.raises(ValueError, match="'nam' .*name, vendor, fact"):
        read(Source("bundled:train", tasks=["nam"]))


def test_items_of_a_file_keep_their_ids(folder: Path) -> None:
    path = write(
        folder / "items.jsonl", {"id": "k", "text": "x", "fields": {"a": "b"}}, {"image": "a.png"}, {"text": "z"}
    )
    items = read_items(path, limit=2)
    assert items == [
        Item("", (Text("x"),), {"a": "b", "id": "k"}),
        Item("", (Image(str(folder / "a.png")),), {"id": "2"}),
    ]


def test_items_of_a_folder_are_its_pictures_in_order(folder: Path) -> None:
    items = read_items(folder)
    assert [item.fields["id"] for item in items] == ["a.png", "b.png", "sub/c.jpg"]
    assert items[2].parts == (Image(str(folder / "sub" / "c.jpg")),)
    assert len(read_items(folder, limit=1)) == 1


def test_invalid_items_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"items\.jsonl, line 1, field 'item\.image': image 'x\.png'"):
        read_items(write(folder / "items.jsonl", {"image": "x.png"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has nothing to embed"):
        read_items(tmp_path / "empty")
