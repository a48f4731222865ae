"""Tests of embedding files: reading what was written, errors for bad files, exact search and drawn results."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage

from mmemb.drawing.cards import draw_results, wrap
from mmemb.inference.embedding_files import write_embeddings
from mmemb.search.exact import read_embeddings
from mmemb.types import Encoded, Image, Item, Text


def encoded(vectors: torch.Tensor) -> Encoded:
    rows = len(vectors)
    thought = torch.arange(rows) % 2 == 1
    texts = ["a thought" if yes else "" for yes in thought]
    return Encoded(
        vectors, thought, thought.float(), texts, torch.where(thought, 4, 0), torch.zeros(rows, dtype=torch.bool)
    )


ITEMS = [
    Item("", (Text("red apple"),)),
    Item("", (Image("/pictures/a.png"), Text("a caption"), Image("bundled:b"))),
    Item("", (Text("x" * 900),), {"id": "named"}),
    Item("", (Image(PILImage.new("RGB", (4, 4))),)),
]
VECTORS = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.2]]), dim=-1)


def test_embeddings_survive_writing_and_reading(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "deep" / "e.parquet", ITEMS, encoded(VECTORS), model="tiny#1")
    index = read_embeddings(path, model="tiny#1")
    assert index.ids == ["0", "1", "named", "3"]
    assert torch.equal(index.embeddings, VECTORS)
    assert index.images == [[], ["/pictures/a.png", "bundled:b"], [], []]
    assert index.texts[0] == "red apple"
    assert len(index.texts[2]) == 500
    assert index.rationales == ["", "a thought", "", "a thought"]
    assert index.tokens.tolist() == [0, 4, 0, 4]
    assert index.item(1) == Item("", (Image("/pictures/a.png"), Image("bundled:b"), Text("a caption")))
    assert index.item(0) == ITEMS[0]
    assert [file.name for file in path.parent.iterdir()] == ["e.parquet"]
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.float32(), 2)


def test_search_is_exact_and_keeps_the_order_of_ties(tmp_path: Path) -> None:
    twice = torch.cat([VECTORS, VECTORS[:1]])
    path = write_embeddings(tmp_path / "e.parquet", [*ITEMS, ITEMS[0]], encoded(twice), ids=list("abcde"))
    index = read_embeddings(path)
    first, second = index.search(torch.stack([VECTORS[0], VECTORS[2]]), k=3)
    assert [hit.id for hit in first] == ["a", "e", "b"]
    assert [hit.score for hit in first] == pytest.approx([1.0, 1.0, 0.8])
    assert [hit.id for hit in second] == ["c", "b", "d"]
    assert [hit.row for hit in index.search(VECTORS[3], k=99)[0]][0] == 3
    assert len(index.search(VECTORS[3], k=99)[0]) == len(index) == 5


def test_search_refuses_wrong_arguments(tmp_path: Path) -> None:
    index = read_embeddings(write_embeddings(tmp_path / "e.parquet", ITEMS, encoded(VECTORS)))
    with pytest.raises(ValueError, match="the query has 3 dimensions, but the index has 2"):
        index.search(torch.ones(1, 3))
    with pytest.raises(ValueError, match="k is 0"):
        index.search(VECTORS, k=0)


def test_errors_name_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet: there is no such file"):
        read_embeddings(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a readable Parquet file"):
        read_embeddings(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="column 'text' is missing"):
        read_embeddings(tmp_path / "other.parquet")
    write_embeddings(tmp_path / "e.parquet", ITEMS, encoded(VECTORS), model="tiny#1")
    with pytest.raises(ValueError, match=r"embedded by another model .tiny#1., but the query's model is tiny#2"):
        read_embeddings(tmp_path / "e.parquet", model="tiny#2")
    table = pq.read_table(tmp_path / "e.parquet")
    loose = table.set_column(3, "embedding", pa.array([[1.0]] * 4))
    pq.write_table(loose, tmp_path / "loose.parquet")
    with pytest.raises(ValueError, match="the embeddings vary in length"):
        read_embeddings(tmp_path / "loose.parquet")


def test_errors_name_a_file_with_a_damaged_text_that_still_decompresses(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.parquet", ITEMS, encoded(VECTORS))
    pq.write_table(pq.read_table(path), path, compression="none", write_statistics=False)
    whole = path.read_bytes()
    assert b"red apple" in whole
    path.write_bytes(whole.replace(b"red apple", b"red \xffpple"))
    with pytest.raises(ValueError, match=r"e\.parquet: not a readable Parquet file"):
        read_embeddings(path)


def test_numbers_of_items_and_embeddings_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 items, 2 ids and 4 embeddings"):
        write_embeddings(tmp_path / "e.parquet", ITEMS[:2], encoded(VECTORS))
    assert list(tmp_path.iterdir()) == []


def test_results_are_drawn_even_if_a_picture_is_missing(tmp_path: Path) -> None:
    red = PILImage.new("RGB", (40, 20), "#ff0000")
    results = [
        (Item("", (Image(red),)), 0.9),
        (Item("", (Image("/gone.png"),)), 0.5),
        (Item("", (Text("words"),)), 0.1),
    ]
    path = draw_results(tmp_path / "out" / "r.png", Item("find it", (Text("a red box"),)), results, columns=2)
    drawn = PILImage.open(path).convert("RGB")
    reds = sum(count for count, colour in drawn.getcolors(1 << 20) if colour == (255, 0, 0))
    assert reds > 100 * 100 / 2  # the picture is 2:1, so it covers half of its square
    two_lines = drawn.height
    draw_results(path, Item("", (Text("q"),)), results[:2], columns=2)
    assert PILImage.open(path).height < two_lines
    draw_results(path, Item("", (Text("q"),)), [])
    assert [file.name for file in path.parent.iterdir()] == ["r.png"]


def test_text_wraps_within_its_width() -> None:
    from mmemb.drawing.cards import font

    text = "some words and a" + "very" * 30 + "longone to break"
    lines = wrap(text, width=120, size=15, lines=99)
    assert all(font(15).getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, width=120, size=15, lines=2)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert font(15).getlength(cut[1]) <= 120


def test_another_checkpoint_of_the_same_architecture_is_refused(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "e.parquet", ITEMS, encoded(VECTORS), model="tiny#1+aa")
    assert read_embeddings(path, model="tiny#1+aa").model == "tiny#1+aa"
    with pytest.raises(ValueError, match="embedded by another checkpoint of the same architecture"):
        read_embeddings(path, model="tiny#1+bb")
